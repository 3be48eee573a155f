"""The processes of a rehearsal: a real coordinator and an emulated worker for every node of a cluster file.

Everything lies below one directory and ends with the context. The time scale reaches whatever is in seconds: layer
times, links, and the limits that would otherwise take slowness for death.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from helixd.emulation.hollow import HollowModel
from helixd.ids import NodeId
from helixd.layers import LayerRange
from helixd.plan.cluster.spec import ClusterSpec
from helixd.sim.stage_node import StepLimits

MODEL = "rehearsed"
READY_WITHIN_S = 300.0


DEFAULT_LIMITS = StepLimits()


class RehearsalFailed(Exception):
    """A process ended, or the cluster did not come up; the message says which."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What the cluster is started with. `placement`: exactly this, None to let the coordinator plan."""

    cluster_file: Path
    spec: ClusterSpec
    model_dir: Path
    hollow: HollowModel
    time_scale: float
    placement: Mapping[NodeId, LayerRange] | None
    limits: StepLimits = DEFAULT_LIMITS
    settings: tuple[str, ...] = ()


class RehearsalCluster:
    """Use as a context manager; on entry all processes are started."""

    def __init__(self, home: Path, stage: Stage) -> None:
        self.home = home
        self.stage = stage
        self.api = f"127.0.0.1:{_free_port()}"
        self._peers = f"127.0.0.1:{_free_port()}"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __enter__(self) -> "RehearsalCluster":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get(self, path: str) -> Any:
        """An answer of the coordinator's API. Raises OSError."""
        with self._opener.open(f"http://{self.api}{path}", timeout=30) as answer:
            return json.load(answer)

    def wait_ready(self) -> None:
        """Until a complete pipeline serves. Raises RehearsalFailed."""
        deadline = time.monotonic() + READY_WITHIN_S
        why = "the coordinator does not answer"
        while time.monotonic() < deadline:
            self.check()
            try:
                self.get("/readyz")
                return
            except urllib.error.HTTPError as error:
                why = str(json.load(error)["error"]["message"])
            except OSError:
                pass
            time.sleep(0.5)
        raise RehearsalFailed(f"not ready within {READY_WITHIN_S:g} s: {why}; logs are in {self.home}")

    def wait_view(self) -> Any:
        """`/cluster`, once every node that serves has told its KV room. Raises RehearsalFailed."""
        deadline = time.monotonic() + READY_WITHIN_S
        while time.monotonic() < deadline:
            self.check()
            view = self.get("/cluster")
            serving = [node for node in view["nodes"] if node["layers"]]
            if serving and all(node["load"] and node["load"]["kv_capacity_token_layers"] for node in serving):
                return view
            time.sleep(0.5)
        raise RehearsalFailed(f"not every node tells its KV room; logs are in {self.home}")

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time that the coordinator and all workers together have taken so far."""
        found = {"coordinator": 0.0, "workers": 0.0}
        for name, process in self._processes.items():
            times = psutil.Process(process.pid).cpu_times()
            found["coordinator" if name == "coordinator" else "workers"] += times.user + times.system
        return found

    def check(self) -> None:
        """Raise RehearsalFailed if a process has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                tail = "\n".join((self.home / f"{name}.log").read_text(errors="replace").splitlines()[-12:])
                raise RehearsalFailed(f"{name} ended with status {process.returncode}\n{tail}")

    def close(self) -> None:
        """End every process."""
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        for process in self._processes.values():
            process.wait()

    def _start(self) -> None:
        stage, scale = self.stage, self.stage.time_scale
        slow = [
            f"cluster.timers.step={120 * scale:.0f}s", "cluster.timers.dead_after=60s", "cluster.timers.send=600s",
            "cluster.timers.ping=5s", "log.level=warning",
        ]  # fmt: skip
        limits = [
            f"engine.max_batch_sequences={stage.limits.max_sequences}",
            f"engine.max_batch_tokens={stage.limits.max_sequences + stage.limits.chunk_tokens}",
            f"engine.prefill_chunk_tokens={stage.limits.chunk_tokens}",
        ]
        self._spawn(
            "coordinator", "--role", "coordinator", "--config", str(self._config()), "--model", str(stage.model_dir),
            "--listen", self.api, "--peer-listen", self._peers, *_set(slow), *_set(limits), *_set(stage.settings),
        )  # fmt: skip
        for node in stage.spec.nodes:
            if node.exclude:
                continue
            self._spawn(
                node.id, "--role", "worker", "--coordinator", self._peers, "--device", f"emulated:{node.profile.type}",
                "--cluster-file", str(stage.cluster_file), "--time-scale", str(scale),
                "--memory", str(stage.hollow.memory_bytes(node.profile)), "--set", f"node.id={node.id}", *_set(slow),
            )  # fmt: skip

    def _config(self) -> Path:
        stage = self.stage
        workload = stage.spec.workload
        nodes = [node for node in stage.spec.nodes if not node.exclude]
        lines = [
            "[model]", f'name = "{MODEL}"', "[api.limits]", "queue = 100000", "per_key_in_flight = 100000",
            'request = "100h"', 'write_stall = "1h"', "connections = 20000", 'body = "64MiB"', "[planner]",
            f"wait_for_nodes = {len(nodes)}", f"mean_input_tokens = {workload.mean_input_tokens}",
            f"mean_output_tokens = {workload.mean_output_tokens}", 'replan_cooldown = "100h"',
            # What emulated nodes take longer than the file says is this machine's load.
            'drift_hold = "100h"',
        ]  # fmt: skip
        for node in nodes:
            lines.append(f'[planner.pins."{node.id}"]')
            if stage.placement is None:
                lines.append(f"max_layers = {max(1, node.profile.max_layers)}")
            elif node.id in stage.placement:
                lines.append(f"range = {list(stage.placement[node.id].to_pair())}")
            else:
                lines.append("exclude = true")
        path = self.home / "rehearsal.toml"
        path.write_text("\n".join(lines) + "\n")
        return path

    def _spawn(self, name: str, *arguments: str) -> None:
        words = [sys.executable, "-m", "helixd", "--state-dir", str(self.home / "state" / name), *arguments]
        environment = {**os.environ, "HELIXD_CONFIG": os.devnull}
        with (self.home / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )


def _set(settings: tuple[str, ...] | list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
