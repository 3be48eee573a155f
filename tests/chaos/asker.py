"""A client that asks once in a thread of its own, may leave at any moment, and knows how it ended."""

import http.client
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Question:
    """`text`: the reference's answer."""

    prompt: list[int]
    max_tokens: int
    text: str


class Asked:
    """One streamed completion. `ends`: how it ended, once; more than one is a mistake, none is a request that runs.

    An end is `finished`, `left`, `refused` (with a status), `error` (an event), or `broken` (the connection was).
    `now` gives a number that changes when a coordinator begins to end and when it has ended, and how many faults there
    were so far.
    """

    def __init__(self, api: str, question: Question, now: Callable[[], tuple[int, int]]) -> None:
        self.question = question
        self.ends: list[str] = []
        self.detail = ""
        self.text = ""
        self.reason: str | None = None
        self._now = now
        self._after = now()
        self.life = self._after[0]
        self._left = False
        host, port = api.split(":")
        self._connection = http.client.HTTPConnection(host, int(port), timeout=PATIENCE_S)
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="client", daemon=True)
        self._thread.start()

    def __str__(self) -> str:
        return f"request for {self.question.max_tokens} tokens ({self.ends}, {self.detail}, {len(self.text)} letters)"

    def leave(self) -> None:
        """Close the connection."""
        self._left = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def wrong(self) -> list[str]:
        """What must not be, once it has ended."""
        found = [] if len(self.ends) == 1 else ["does not have exactly one end"]
        if not self.question.text.startswith(self.text):
            found.append(f"got {self.text!r}, the reference says {self.question.text!r}")
        if "finished" in self.ends and (self.text, self.reason) != (self.question.text, "length"):
            found.append(f"is {self.text!r} ({self.reason}), not all of {self.question.text!r}")
        life, faults = self._after
        if set(self.ends) & {"error", "refused", "broken"} and not faults:
            found.append("ended badly without a fault that could be the cause")
        if "broken" in self.ends and life == self.life:
            found.append("broke off though its coordinator lived")
        return found

    def _run(self) -> None:
        try:
            end = self._ask()
        except (OSError, http.client.HTTPException, ValueError) as error:
            # What is closed under a reader shows in many ways.
            end = "refused" if isinstance(error, ConnectionRefusedError) else "broken"
            self.detail = repr(error)
        finally:
            self._connection.close()
        self._after = self._now()
        self.ends.append("left" if self._left else end)

    def _ask(self) -> str:
        self._connection.connect()
        self._socket = self._connection.sock
        if self._left:
            return "left"
        body = {
            "model": "m", "prompt": self.question.prompt, "max_tokens": self.question.max_tokens, "temperature": 0,
            "ignore_eos": True, "stream": True,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", json.dumps(body).encode(), headers)
        answer = self._connection.getresponse()
        if answer.status != 200:
            self.detail = f"{answer.status} {json.load(answer)['error']['code']}"
            return "refused"
        end = "broken"
        while line := answer.readline():
            if not line.startswith(b"data: "):
                continue
            if line == b"data: [DONE]\n":
                end = "finished"
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                self.detail = chunk["error"]["code"]
                return "error"
            self.text += chunk["choices"][0]["text"]
            self.reason = chunk["choices"][0]["finish_reason"] or self.reason
        return end
