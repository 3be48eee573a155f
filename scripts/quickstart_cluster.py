"""What scripts/quickstart does once helixd is installed: a cluster of unequal workers on this machine, and one answer.

Starts a coordinator and three workers, each a process of its own with its own state, waits until they serve, prints the
placement, streams a completion through curl, and stops what it started, whatever happens. Each wait has a limit and
shows the logs of what it waited for when it is over.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY = ("4MiB", "6MiB", "9MiB")
READY_WITHIN_S = 120.0
PROMPT = "def main("
MAX_TOKENS = 120


class QuickstartFailed(Exception):
    """Something did not come up; the message says what and where to look."""


class Cluster:
    """The processes and their logs, all below one directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.api = f"127.0.0.1:{free_port()}"
        self.peers = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start the coordinator and the workers."""
        self._spawn(
            "coordinator", "--role", "coordinator", "--model", "demo", "--listen", self.api,
            "--peer-listen", self.peers, "--set", f"planner.wait_for_nodes={len(MEMORY)}",
        )  # fmt: skip
        for number, memory in enumerate(MEMORY, 1):
            self._spawn(
                f"worker-{number}", "--role", "worker", "--coordinator", self.peers, "--memory", memory,
                "--device", "cpu", "--set", f"node.id=worker-{number}", "--set", "device.threads=1",
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Until a complete pipeline serves. Raises QuickstartFailed with the reason and the logs' ends."""
        deadline = time.monotonic() + READY_WITHIN_S
        reason = "the coordinator has not answered yet"
        while time.monotonic() < deadline:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise QuickstartFailed(f"{name} ended with status {process.returncode}\n{self.tails()}")
            try:
                self.get("/readyz")
                return
            except urllib.error.HTTPError as error:
                reason = error.read().decode("utf-8", "replace")
            except OSError:
                pass
            time.sleep(0.2)
        raise QuickstartFailed(f"not ready after {READY_WITHIN_S:g} s: {reason}\n{self.tails()}")

    def get(self, path: str) -> Any:
        """A JSON document of the API."""
        with urllib.request.urlopen(f"http://{self.api}{path}", timeout=5) as answer:
            return json.load(answer)

    def stop(self) -> None:
        """End every process: politely, then not."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + 10
        for process in self.processes.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def tails(self) -> str:
        """The last lines of every log."""
        parts = []
        for name in self.processes:
            lines = (self.home / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-8:]
            parts.append(f"--- {name}\n" + "\n".join(lines))
        return "\n".join(parts)

    def _spawn(self, name: str, *arguments: str) -> None:
        environment = {**os.environ, "HELIXD_CONFIG": os.devnull, "OMP_NUM_THREADS": "1"}
        with (self.home / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [
                    sys.executable, "-m", "helixd", *arguments, "--state-dir", str(self.home / name),
                    "--set", f"node.cache_dir={self.home / name}", "--set", "log.format=text",
                    "--set", "cluster.timers.drain=5s",
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def show_placement(cluster: Cluster) -> None:
    """Who holds what, as the coordinator sees it."""
    view = cluster.get("/cluster")
    layers = view["model"]["layers"]
    print(f"\nPlacement of {view['model']['name']} ({layers} layers), epoch {view['epoch']}:\n")
    print(f"  {'worker':<12}{'memory':>9}  {'layers':<10}{'KV room':>14}   held")
    for node in view["nodes"]:
        held = node["layers"] or [0, 0]
        bar = "".join("#" if held[0] <= layer < held[1] else "." for layer in range(layers))
        room = node["load"]["kv_capacity_token_layers"] if node["load"] else 0
        tokens = f"{room // max(1, held[1] - held[0])} tokens"
        memory = f"{node['memory_budget_bytes'] / 2**20:g} MiB"
        print(f"  {node['id']:<12}{memory:>9}  [{held[0]}, {held[1]})".ljust(35) + f"{tokens:>14}   {bar}")
    print(f"\n  planned flow: {view['plan']['max_flow_tokens_per_s']:.0f} tokens/s", flush=True)


def curl_command(api: str, *options: str) -> list[str]:
    """A streamed completion, as anybody could type it."""
    body = {
        "model": "demo", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0,
        "stream": True,
    }  # fmt: skip
    return [
        "curl", "-sS", "-N", *options, f"http://{api}/v1/completions", "-H", "Content-Type: application/json",
        "-d", json.dumps(body),
    ]  # fmt: skip


def stream_answer(cluster: Cluster) -> None:
    """Send the request, print the text as it comes, then the route and the speed."""
    print("\n$ " + " ".join(curl_command("HOST:PORT")[:4]) + " ...\n", flush=True)
    headers = cluster.home / "headers.txt"
    sys.stdout.write(PROMPT)
    started = time.monotonic()
    first: float | None = None
    tokens, done = 0, False
    with subprocess.Popen(
        curl_command(cluster.api, "--max-time", "120", "-D", str(headers)), stdout=subprocess.PIPE, text=True
    ) as curl:
        assert curl.stdout is not None
        for line in curl.stdout:
            if line.startswith("{") or '"error"' in line:
                raise QuickstartFailed(f"the request failed: {line.strip()}\n{cluster.tails()}")
            if line.strip() == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                first = first or time.monotonic()
                tokens += 1
                sys.stdout.write(json.loads(line[6:])["choices"][0]["text"])
                sys.stdout.flush()
    if not done or first is None:
        raise QuickstartFailed(f"the stream ended early (curl status {curl.returncode})\n{cluster.tails()}")
    took = max(1e-6, time.monotonic() - first)
    print(f"\n\nroute: {_route(headers)}")
    print(f"first token after {first - started:.2f} s, then {max(0, tokens - 2) / took:.1f} tokens/s", flush=True)


def _route(headers: Path) -> str:
    for line in headers.read_text(encoding="latin-1").splitlines():
        name, _, value = line.partition(":")
        if name.lower() == "x-helixd-route":
            return value.strip()
    return "unknown"


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends this like Ctrl-C does: with everything stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the cluster running")
    keep = parser.parse_args().keep
    home = Path(tempfile.mkdtemp(prefix="helixd-quickstart-"))
    cluster = Cluster(home)
    left_running = False
    print(f"Starting a coordinator and {len(MEMORY)} workers of {', '.join(MEMORY)} (logs in {home})", flush=True)
    try:
        with interruptible():
            cluster.start()
            cluster.wait_ready()
            time.sleep(1.2)  # the workers report their load once a second
            show_placement(cluster)
            stream_answer(cluster)
            left_running = keep
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except QuickstartFailed as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    finally:
        if left_running:
            pids = " ".join(str(process.pid) for process in cluster.processes.values())
            print(f"\nStill running. Try:\n  curl http://{cluster.api}/cluster")
            print("  " + " ".join(f"'{part}'" if " " in part else part for part in curl_command(cluster.api)))
            print(f"Stop it with:\n  kill {pids}")
        else:
            cluster.stop()
            print("Stopped everything.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
