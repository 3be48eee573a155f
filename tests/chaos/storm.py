"""A cluster of real daemons to which things happen in an order that a seed decides, and what must hold afterwards.

Real processes are not deterministic: the same seed gives the same steps, not the same history. `story` tells the steps.
What must hold is the failure model's list: I1 texts are the reference's, I2 and I3 nothing is held and nothing runs, I4
no descriptor is lost, I6 every request has one end, I7 the coordinator counted the same ends, I8 epochs only rise and
everybody is on the one in force. (I5, memory over many thousand requests, is a soak's.)
"""

import random
import signal
import time
import urllib.error
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helixd.exits import Exit
from tests.chaos.asker import Asked, Question
from tests.chaos.streams import until
from tests.daemons import Daemons
from tests.faults.proxy import ChaosProxy

HUB = "coordinator"
WAITS_S = (0.0, 0.02, 0.1, 0.3, 1.0, 2.0)
ENOUGH = 2
"""Workers that can hold all layers: no step leaves fewer processes."""
SPARED = 0.8
"""How often nobody is hit while little is left: processes take long to start, and somebody is to be served."""
STEADY_S = 180.0
"""Everything that was started has joined, is measured and planned with: most of it is the start of processes."""
CLIENTS_S = 90.0


class Storm:
    """Steps are taken with `step`; `settle` undoes every fault and checks.

    `workers`: their arguments by name. `lines`: what leads each of them to the coordinator.
    """

    def __init__(
        self, made: Daemons, workers: dict[str, list[str]], lines: dict[str, ChaosProxy], questions: Sequence[Question],
        seed: int,
    ) -> None:  # fmt: skip
        self.made = made
        self.clients: list[Asked] = []
        self.did: Counter[str] = Counter()
        self._workers = workers
        self._lines = lines
        self._questions = questions
        self._draw = random.Random(seed)
        self._log: list[str] = []
        self._stopped: set[str] = set()
        self._cut: set[str] = set()
        self._leaving: set[str] = set()
        self._life = 0
        self._faults = 0
        self._epoch = 0
        self._began_s = time.monotonic()
        self._undo()
        made.wait(self._steady, "all nodes to be up before the storm", STEADY_S)
        # The coordinator may have served an earlier storm.
        self._counted = self._ends_counted()

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One thing happens, and some time passes. Raises AssertionError as `settle`."""
        try:
            self._step()
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *self._log])) from error

    def _step(self) -> None:
        self._reap()
        steps = [self._submit] * 8 + [self._cancel] * 3 + [self._join] * 4 + [self._kill] * 3 + [self._stop] * 2
        steps += [self._cont] * 2 + [self._leave] * 2 + [self._partition] * 2 + [self._heal] * 2
        steps += [self._restart_coordinator]
        before = self.did.total()
        while self.did.total() == before:
            self._draw.choice(steps)()
        time.sleep(self._draw.choice(WAITS_S))
        self._look()

    def _submit(self) -> None:
        for _ in range(self._draw.randint(1, 4)):
            asked = Asked(self.made.api, self._draw.choice(self._questions), lambda: (self._life, self._faults))
            self.clients.append(asked)
        self._did("submit", f"up to {len(self.clients)}")

    def _cancel(self) -> None:
        if running := [client for client in self.clients if not client.ends]:
            one = self._draw.choice(running)
            one.leave()
            self._did("cancel")

    def _join(self) -> None:
        if absent := sorted(set(self._workers) - set(self.made.all)):
            name = self._draw.choice(absent)
            self.made.start(name, *self._workers[name])
            self._did("join", name)

    def _kill(self) -> None:
        if name := self._victim():
            self.made.all.pop(name).kill()
            self._did("kill", name, fault=True)

    def _stop(self) -> None:
        if name := self._victim():
            self.made.all[name].signal(signal.SIGSTOP)
            self._stopped.add(name)
            self._did("stop", name, fault=True)

    def _cont(self) -> None:
        if self._stopped:
            name = self._draw.choice(sorted(self._stopped))
            self._go_on(name)
            self._did("cont", name)

    def _leave(self) -> None:
        if name := self._victim():
            self.made.all[name].signal(signal.SIGTERM)
            self._leaving.add(name)
            self._did("leave", name, fault=True)

    def _partition(self) -> None:
        if name := self._victim():
            line, ways = self._lines[name], self._draw.choice(("both ways", "there", "back"))
            line.there.blocked, line.back.blocked = ways != "back", ways != "there"
            self._cut.add(name)
            self._did("partition", f"{name}, {ways}", fault=True)

    def _heal(self) -> None:
        if self._cut:
            name = self._draw.choice(sorted(self._cut))
            self._connect(name)
            self._did("heal", name)

    def _restart_coordinator(self) -> None:
        if self._spared(set(self._workers)):
            return
        # Told first: its clients may hear of it before the kill returns.
        self._did("restart coordinator", fault=True)
        self._life += 1
        self.made.all[HUB].kill()
        self._life += 1
        self._counted = Counter()
        time.sleep(self._draw.choice((0.0, 0.5)))
        self.made.restart(HUB)
        until(lambda: self._view() is not None, "the coordinator to answer", STEADY_S)

    # -- the end -----------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Undo every fault. Raises AssertionError for what does not come right again, with the story of the steps."""
        try:
            self._undo()
            until(lambda: all(client.ends for client in self.clients), "every request to end", CLIENTS_S)
            self.made.wait(self._steady, "all nodes to be up and on the epoch in force", STEADY_S)
            self.made.wait_idle()
            self._look()
            wrong = [f"{client} {why}" for client in self.clients for why in client.wrong()]
            assert not wrong, "\n".join(wrong)
            self._check_counts()
            self._check_descriptors()
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *self._log])) from error

    def _undo(self) -> None:
        self._note("settle")
        for name in sorted(self._stopped):
            self._go_on(name)
        for name in sorted(self._lines):
            self._connect(name)
        until(lambda: not self._reap(), "those that leave to be gone", STEADY_S)
        for name in sorted(self._workers):
            if name not in self.made.all or self.made.all[name].process.poll() is not None:
                self.made.start(name, *self._workers[name])

    def _steady(self) -> bool:
        view = self.made.get("/cluster")
        held = [node for node in view["nodes"] if node["layers"] is not None]
        return bool(
            view["ready"]["ready"]
            and {node["id"] for node in view["nodes"]} == set(self._workers)
            and all(node["measured"] and node["load"] for node in view["nodes"])
            and view["coming_epoch"] is None
            and all(node["confirmed"] == {"epoch": view["epoch"], "state": "ready"} for node in held)
            and not any(link["error"] or link["relayed"] for link in view["links"])
        )

    def _check_counts(self) -> None:
        """[I7] Whoever got a whole answer in this life of the coordinator is counted once, as having got it."""
        whole = sum(client.ends == ["finished"] and client.life == self._life for client in self.clients)
        reasons = self._ends_counted() - self._counted
        counted = sum(count for label, count in reasons.items() if 'finished_reason="length"' in label)
        assert counted >= whole, f"{whole} whole answers came, {reasons} are counted"
        asked = sum(client.life == self._life for client in self.clients)
        assert reasons.total() <= asked, f"{asked} were asked for, {reasons} are counted"

    def _check_descriptors(self) -> None:
        """[I4] Questions, and clients that leave, cost no daemon a descriptor."""

        def held() -> dict[str, int]:
            return {
                name: len(list(Path(f"/proc/{daemon.process.pid}/fd").iterdir()))
                for name, daemon in self.made.all.items()
            }

        before = held()
        some = [Asked(self.made.api, question, lambda: (0, 0)) for question in self._questions]
        some[0].leave()
        until(lambda: all(client.ends for client in some), "the last questions to be answered", CLIENTS_S)
        assert [client.ends for client in some[1:]] == [["finished"]] * (len(some) - 1), [str(c) for c in some]
        assert not any(client.wrong() for client in some)
        self.made.wait_idle()
        until(lambda: all(held()[name] <= count + 2 for name, count in before.items()), f"{before}", 20)

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _ends_counted(self) -> Counter[str]:
        """Requests that the coordinator says have ended, by how."""
        return Counter({k: int(v) for k, v in self.made.figures("helixd_request_success_total").items()})

    def _victim(self) -> str | None:
        able = sorted(set(self.made.all) - {HUB} - self._stopped - self._leaving - self._cut)
        if len(able) <= ENOUGH or self._spared(set(able)):
            return None
        return self._draw.choice(able)

    def _spared(self, able: set[str]) -> bool:
        """Whether nothing is to break now: little is left to break."""
        view = self._view()
        nodes = set() if view is None else {node["id"] for node in view["nodes"]}
        little = view is None or not view["ready"]["ready"] or len(nodes & able) <= ENOUGH
        return little and self._draw.random() < SPARED

    def _view(self) -> Any:
        """What the coordinator shows; None while it does not answer."""
        try:
            return self.made.get("/cluster")
        except (OSError, urllib.error.HTTPError):
            return None

    def _reap(self) -> bool:
        """Forget those that have left; whether some have not yet."""
        for name in sorted(self._leaving):
            status = self.made.all[name].process.poll()
            if status is not None:
                # Who has not begun yet has not said what to do at that signal.
                assert status in (Exit.OK, -signal.SIGTERM), f"{name}: {status}\n{self.made.all[name].text[-3000:]}"
                del self.made.all[name]
                self._leaving.discard(name)
        return bool(self._leaving)

    def _go_on(self, name: str) -> None:
        self.made.all[name].signal(signal.SIGCONT)
        self._stopped.discard(name)

    def _connect(self, name: str) -> None:
        self._lines[name].heal()
        self._cut.discard(name)

    def _look(self) -> None:
        """[I8] An epoch only rises, over restarts of the coordinator too; nobody ends by itself."""
        for name, daemon in self.made.all.items():
            status = daemon.process.poll()
            assert status is None or name in self._leaving, f"{name} ended: {status}\n{daemon.text[-3000:]}"
        view = self._view()
        if view is not None and view["epoch"] is not None:
            assert view["epoch"] >= self._epoch, f"epoch {view['epoch']} comes after {self._epoch}"
            self._epoch = view["epoch"]

    def _did(self, what: str, which: str = "", fault: bool = False) -> None:
        self.did[what] += 1
        self._faults += fault
        self._note(f"{what} {which}")

    def _note(self, what: str) -> None:
        self._log.append(f"{time.monotonic() - self._began_s:.2f} {what}")
