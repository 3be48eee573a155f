"""What scripts/quickstart does once helixd is installed: a cluster of unequal workers on this machine, and one answer.

Starts a coordinator and three workers, each a process of its own with its own state, waits until they serve, prints the
placement, streams a completion through curl, and stops what it started, whatever happens. Each wait has a limit, and
shows the logs of what it waited for when it is over.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

# The demo model takes 7.6 MB in all, more than any of these.
MEMORY = ("3MiB", "4MiB", "5MiB")
READY_WITHIN_S = 120.0
LOADS_WITHIN_S = 10.0
ANSWER_WITHIN_S = 120.0
STOP_WITHIN_S = 10.0
POLL_S = 0.1
PROMPT = "def main(argv=None):"
MAX_TOKENS = 120

T = TypeVar("T")


class QuickstartFailed(Exception):
    """Something did not come up; the message says what."""


class Interrupts:
    """Ctrl-C, SIGTERM and SIGHUP as KeyboardInterrupt, but never in the middle of what must be done whole."""

    def __init__(self) -> None:
        self._whole = 0
        self._asked = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    @contextmanager
    def later(self) -> Iterator[None]:
        """An interrupt in here comes when it is over."""
        self._whole += 1
        try:
            yield
        finally:
            self._whole -= 1
        if self._asked and not self._whole:
            raise KeyboardInterrupt

    def ignore(self) -> None:
        """What is left to do is stopping: it need not be asked for again."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: object) -> None:
        self._asked = True
        if not self._whole:
            raise KeyboardInterrupt


class Cluster:
    """The processes and their logs, all below one directory."""

    def __init__(self, home: Path, interrupts: Interrupts) -> None:
        self.home = home
        self.api = f"127.0.0.1:{free_port()}"
        self.peers = f"127.0.0.1:{free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._interrupts = interrupts
        # Whatever proxy the user has is for elsewhere.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def start(self) -> None:
        """Start the coordinator and the workers."""
        self._spawn(
            "coordinator", "--role", "coordinator", "--model", "demo", "--listen", self.api,
            "--peer-listen", self.peers, "--set", f"planner.wait_for_nodes={len(MEMORY)}",
        )  # fmt: skip
        for number, memory in enumerate(MEMORY, 1):
            self._spawn(
                f"worker-{number}", "--role", "worker", "--coordinator", self.peers, "--memory", memory,
                "--device", "cpu", "--set", "device.threads=1",
            )  # fmt: skip

    def wait_ready(self) -> None:
        """Until a complete pipeline serves; says what it waits for. Raises QuickstartFailed."""
        said = ""

        def ready() -> bool | None:
            nonlocal said
            try:
                self.get("/readyz")
                return True
            except urllib.error.HTTPError as error:
                reason = str(json.load(error)["error"]["message"])
            if reason != said:
                print(f"  {reason}", flush=True)
                said = reason
            return None

        self.wait_for(ready, "a complete pipeline", READY_WITHIN_S)

    def wait_for(self, look: Callable[[], T | None], what: str, within_s: float) -> T:
        """What `look` finds, asked again and again. Raises QuickstartFailed when a process ends or time is up."""
        deadline = time.monotonic() + within_s
        while True:
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise QuickstartFailed(f"{name} ended with status {process.returncode}")
            try:
                found = look()
            except OSError:
                found = None  # The coordinator does not listen yet.
            if found is not None:
                return found
            if time.monotonic() > deadline:
                raise QuickstartFailed(f"waited {within_s:g} s for {what}")
            time.sleep(POLL_S)

    def get(self, path: str) -> Any:
        """A JSON document of the API."""
        with self._opener.open(f"http://{self.api}{path}", timeout=5) as answer:
            return json.load(answer)

    def stop(self) -> None:
        """End every process: politely, then not."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_WITHIN_S
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
            lines = (self.home / f"{name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
            parts.append("\n".join([f"--- {name}.log", *lines]))
        return "\n".join(parts)

    def _spawn(self, name: str, *arguments: str) -> None:
        command = [
            sys.executable, "-m", "helixd", *arguments, "--name", name, "--set", f"node.id={name}",
            "--state-dir", str(self.home / name), "--set", f"node.cache_dir={self.home / name / 'cache'}",
            "--set", "log.format=text", "--set", "cluster.timers.drain=5s",
        ]  # fmt: skip
        # Nothing of the user's own helixd may reach this one.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HELIXD_")}
        environment |= {"HELIXD_CONFIG": os.devnull, "OMP_NUM_THREADS": "1"}
        with self._interrupts.later(), (self.home / f"{name}.log").open("wb") as log:
            # A session of its own: Ctrl-C in the terminal reaches this script, which stops them in order.
            self.processes[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def show_placement(cluster: Cluster) -> None:
    """Who holds what, as the coordinator sees it once every worker has reported its load."""

    def loaded() -> Any:
        view = cluster.get("/cluster")
        loads = [node["load"] for node in view["nodes"] if node["layers"]]
        return view if all(load and load["kv_capacity_token_layers"] for load in loads) else None

    view = cluster.wait_for(loaded, "every worker's first load report", LOADS_WITHIN_S)
    layers = view["model"]["layers"]
    print(f"\nPlacement of {view['model']['name']} ({layers} layers), epoch {view['epoch']}:\n")
    print(f"  {'worker':<12}{'memory':>8}  {'layers':<10}{'KV cache for':>14}   held")
    for node in view["nodes"]:
        start, end = node["layers"] or (0, 0)
        bar = "".join("#" if start <= layer < end else "." for layer in range(layers))
        room = node["load"]["kv_capacity_token_layers"] // max(1, end - start)
        memory = f"{node['memory_budget_bytes'] / 2**20:g} MiB"
        held = f"[{start}, {end})"
        print(f"  {node['id']:<12}{memory:>8}  {held:<10}{f'{room} tokens':>14}   {bar}")
    print(f"\n  max flow: {view['plan']['max_flow_tokens_per_s']:.0f} tokens/s, prompt and output together", flush=True)


def curl_command(api: str) -> list[str]:
    """A streamed completion, as anybody could type it."""
    body = {
        "model": "demo", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0.5, "seed": 7, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    return ["curl", "-sSN", f"http://{api}/v1/completions", "-H", "Content-Type: application/json",
            "-d", json.dumps(body)]  # fmt: skip


def stream_answer(cluster: Cluster) -> None:
    """Send the request, print the text as it comes, then the route and the speed. Raises QuickstartFailed."""
    command = curl_command(cluster.api)
    print(f"\n$ {shlex.join(command)}\n", flush=True)
    headers = cluster.home / "headers.txt"
    options = ["--noproxy", "*", "--max-time", f"{ANSWER_WITHIN_S:g}", "-D", str(headers)]
    started = time.monotonic()
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, text=True) as curl:
        try:
            assert curl.stdout is not None
            first, last, tokens = _print_text(curl.stdout)
        except BaseException:
            curl.kill()
            raise
    route = _header(headers, "x-helixd-route") or "unknown"
    speed = f"{(tokens - 1) / (last - first):.1f} tokens/s" if tokens > 1 and last > first else "one token"
    print(f"\n\nroute: {route}")
    print(f"{tokens} tokens: the first after {first - started:.2f} s, then {speed}", flush=True)


def _print_text(lines: Iterator[str]) -> tuple[float, float, int]:
    """When the first and the last token came, and how many did. Raises QuickstartFailed."""
    sys.stdout.write(PROMPT)
    first = last = 0.0
    tokens, done = 0, False
    for line in map(str.strip, lines):
        if line == "data: [DONE]":
            done = True
            continue
        if not line.startswith(("data: ", "{")):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            raise QuickstartFailed(f"the request failed: {event['error']['message']}")
        if event["usage"]:
            tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            last = time.monotonic()
            first = first or last
            sys.stdout.write(choice["text"])
            sys.stdout.flush()
    if not done:
        raise QuickstartFailed("the stream ended early")
    return first, last, tokens


def _header(file: Path, wanted: str) -> str:
    for line in file.read_text(encoding="latin-1").splitlines():
        name, _, value = line.partition(":")
        if name.lower() == wanted:
            return value.strip()
    return ""


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="scripts/quickstart", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="leave the cluster running")
    keep = parser.parse_args().keep
    interrupts = Interrupts()
    home = Path(tempfile.mkdtemp(prefix="helixd-quickstart-"))
    cluster = Cluster(home, interrupts)
    status = 1
    try:
        print(f"Starting a coordinator and {len(MEMORY)} workers that may use {', '.join(MEMORY)}", flush=True)
        cluster.start()
        cluster.wait_ready()
        show_placement(cluster)
        stream_answer(cluster)
        status = 0
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        status = 130
    except QuickstartFailed as error:
        print(f"\nscripts/quickstart: {error}\n{cluster.tails()}", file=sys.stderr)
    finally:
        interrupts.ignore()
        if status == 0 and keep:
            _say_how_to_go_on(cluster)
        else:
            cluster.stop()
            print("Stopped everything." + (f" Logs are in {home}" if status == 1 else ""))
            if status != 1:
                shutil.rmtree(home)
    return status


def _say_how_to_go_on(cluster: Cluster) -> None:
    pids = " ".join(str(process.pid) for process in cluster.processes.values())
    print(f"\nStill running, with logs and state in {cluster.home}. Look at it, and ask for more:\n")
    print(f"  curl http://{cluster.api}/cluster")
    print(f"  {shlex.join(curl_command(cluster.api))}")
    print(f"\nStop it:\n\n  kill {pids}")


if __name__ == "__main__":
    sys.exit(main())
