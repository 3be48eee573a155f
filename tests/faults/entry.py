"""helixd with faults of its machine, for tests: `python -m tests.faults.entry` in the place of `python -m helixd`.

Files in the state directory, looked for all the time, switch them on:

- `hang`: the device does not come back from a step. The event loop and its links live.
- `busy`: a thread computes and lets go of the interpreter only when it is made to.
- `clock`: its content, in seconds, is how far the wall clock is ahead. Steps of the clock are changes of it;
  `clock.seen` says which is in force.
"""

import contextlib
import datetime
import sys
import threading
import time
from pathlib import Path
from typing import Any

LOOK_S = 0.05
STATE = Path(sys.argv[sys.argv.index("--state-dir") + 1])

_time, _time_ns = time.time, time.time_ns
_ahead_s = 0.0


class WrongDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> "WrongDatetime":
        return cls.fromtimestamp(time.time(), tz)


def watch_clock() -> None:
    global _ahead_s
    while True:
        with contextlib.suppress(OSError, ValueError):
            ahead_s = float((STATE / "clock").read_text())
            if ahead_s != _ahead_s:
                _ahead_s = ahead_s
                (STATE / "clock.seen").write_text(str(ahead_s))
        time.sleep(LOOK_S)


def burn() -> None:
    while True:
        if (STATE / "busy").exists():
            sum(range(100_000))
        else:
            time.sleep(LOOK_S)


def let_devices_hang() -> None:
    from helixd.worker.compute import NodeCompute

    run = NodeCompute.run

    def run_or_hang(self: NodeCompute, step: Any) -> Any:
        while (STATE / "hang").exists():
            time.sleep(LOOK_S)
        return run(self, step)

    NodeCompute.run = run_or_hang  # type: ignore[method-assign]


def main() -> int:
    # Before anything of helixd takes them by name.
    time.time = lambda: _time() + _ahead_s
    time.time_ns = lambda: _time_ns() + int(_ahead_s * 1e9)
    datetime.datetime = WrongDatetime  # type: ignore[misc]
    for work in (watch_clock, burn):
        threading.Thread(target=work, daemon=True, name=work.__name__).start()
    if "worker" in sys.argv:
        let_devices_hang()
    from helixd.cli import main as helixd

    return helixd()


if __name__ == "__main__":
    sys.exit(main())
