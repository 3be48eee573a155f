"""What the chaos tests share: prompts with a clear reference, streams read at once, nodes waited for.

A prompt is clear where the best logit of the reference leads at every position, so that its greedy tokens do not depend
on the order of sums.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.daemons import Daemons, Stream, add_tokenizer, byte_tokenizer, completion
from tests.families import MARGIN, VOCAB, make_checkpoint, reference, reference_tokens

LETTERS = range(1, 94)
"""Ids that are ASCII characters: a prompt that ends within a character would be continued by the answer's text.

Not 0, which the reference takes for padding.
"""


def clear_checkpoint(path: Path, count: int, new: int, longest: int = 40) -> list[list[int]]:
    """Write a checkpoint that can be served; returns `count` prompts with `new` clear tokens after each of them."""
    make_checkpoint("llama2", path, 1)
    add_tokenizer(path)
    draw, found = random.Random(1), list[list[int]]()
    while len(found) < count:
        prompt = [draw.choice(LETTERS) for _ in range(draw.randint(4, longest))]
        if reference(path, tuple(prompt), new).margin > MARGIN:
            found.append(prompt)
    return found


def reference_text(checkpoint: Path, prompt: Sequence[int], new: int) -> str:
    """What the reference answers."""
    return str(byte_tokenizer(VOCAB).decode(reference_tokens(checkpoint, prompt, new)))


def whole(made: Daemons, nodes: int) -> None:
    """Wait until all nodes are there, serve, say how they are, and can reach each other."""

    def complete() -> bool:
        view = made.get("/cluster")
        return (
            len(view["nodes"]) == nodes
            and all((node["confirmed"] or {}).get("state") == "ready" and node["load"] for node in view["nodes"])
            and not any(link["error"] for link in view["links"])
        )

    made.wait(complete, f"all {nodes} nodes to serve", 60)


def loaded(made: Daemons) -> dict[str, int]:
    """How many bytes of weights each node has read in its life."""
    return {node["id"]: node["load"]["weight_bytes_loaded"] for node in made.get("/cluster")["nodes"]}


def counted(made: Daemons) -> Any:
    """How many requests run and wait, and what happened to sequences in the life of this coordinator."""
    return made.get("/cluster")["requests"]


@contextmanager
def in_flight(made: Daemons, prompts: Sequence[Sequence[int]], new: int, **fields: object) -> Iterator[list[Stream]]:
    """A stream per prompt, all of them read at once; at the end all have been read to their ends."""
    with ThreadPoolExecutor(len(prompts)) as threads:
        streams = list(threads.map(lambda prompt: completion(made, prompt, new, **fields), prompts))
        reading = [threads.submit(stream.read) for stream in streams]
        yield streams
        for each in reading:
            each.result()


def until(condition: Callable[[], bool], what: str, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {within_s:g} s for {what}"
        time.sleep(0.001)


def used(streams: Sequence[Stream], names: Sequence[str]) -> str:
    """Of these nodes the one that most routes lead over."""
    hops = [hop.split("[")[0] for stream in streams for hop in stream.route.split(" -> ")]
    return max(names, key=hops.count)


def assert_whole(streams: Sequence[Stream], texts: Sequence[str]) -> None:
    for stream, text in zip(streams, texts, strict=True):
        assert stream.error is None
        assert stream.done
        assert stream.reason == "length"
        assert stream.text == text


def least(streams: Sequence[Stream]) -> int:
    """Tokens that every client has."""
    return min(stream.tokens for stream in streams)


def most(streams: Sequence[Stream]) -> int:
    """Tokens that the first client has."""
    return max(stream.tokens for stream in streams)


def share(values: Sequence[float], part: float) -> float:
    """The value that `part` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))] if ordered else 0.0
