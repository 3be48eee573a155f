"""scripts/quickstart's cluster comes up, shows its placement, streams Python and leaves nothing running."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

SCRIPT = Path(__file__).parents[2] / "scripts" / "quickstart_cluster.py"


def running_below(home: str) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if any(home in word for word in p.info["cmdline"] or ())]


def test_it_serves_and_stops() -> None:
    told = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=180, cwd=SCRIPT.parents[1])
    assert told.returncode == 0, told.stdout + told.stderr
    home = re.search(r"logs in (\S+)\)", told.stdout)
    assert home is not None
    for worker in ("worker-1", "worker-2", "worker-3"):
        assert re.search(rf"{worker}\s+\d+ MiB\s+\[\d+, \d+\)", told.stdout)
    answer = told.stdout.split("def main(", 1)[1].split("route:")[0]
    assert "\n" in answer.strip()
    assert re.search(r"[:(=]", answer)
    assert told.stdout.count("->") >= 1
    assert re.search(r"[\d.]+ tokens/s", told.stdout)
    assert running_below(home[1]) == []


def test_an_interrupt_stops_everything() -> None:
    with subprocess.Popen(
        [sys.executable, SCRIPT], stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parents[1], env=os.environ.copy()
    ) as process:
        assert process.stdout is not None
        home = re.search(r"logs in (\S+)\)", process.stdout.readline())
        assert home is not None
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
    assert running_below(home[1]) == []
