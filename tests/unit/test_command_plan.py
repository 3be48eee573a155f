"""`helixd plan`: what it prints, and how it ends. The search runs in this process, but for the tests that say so."""

import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from helixd import cli
from helixd.commands import plan as command
from helixd.exits import Exit
from helixd.plan.baselines import BASELINES, baseline_plan
from helixd.plan.holding import Holding
from helixd.plan.judge import in_force
from helixd.plan.plan import Infeasible
from helixd.plan.planner import plan_cluster
from helixd.plan.undominated import frontier
from helixd.solver.job import Compared, Doing, Job
from helixd.solver.process import Outcome, PlannerFailed

HOME = """format = "helixd-cluster/1"
name = "home"

[model]
name = "Qwen2.5-14B"
num_layers = 48
layer_bytes = 550e6
activation_bytes = 10240
token_bytes = 4
embedding_bytes = 1.56e9
head_bytes = 1.56e9
kv_bytes_per_token_layer = 4096

[default_link]
bandwidth_bytes_per_s = 117e6
latency_s = 0.0003

[[nodes]]
id = "desk"
hardware = "RTX 4090"

[[nodes]]
id = "old"
hardware = "RTX 3060"

[[nodes]]
id = "laptop"
hardware = "M2 Max"
memory_bytes = 24e9
"""

POINTS = [[1, 0.001], [512, 0.05]]
SMALL: dict[str, Any] = {
    "format": "helixd-cluster/1",
    "name": "small",
    "model": {"name": "m", "num_layers": 4, "layer_bytes": 1e9, "activation_bytes": 1000, "token_bytes": 4},
    "node_types": {
        "t": {
            "memory_bytes": 4e9,
            "max_layers": 3,
            "kv_capacity_token_layers": [30000, 20000, 10000],
            "prompt_layer_time_s": POINTS,
            "decode_layer_time_s": POINTS,
        }
    },
    "nodes": [{"id": name, "type": "t"} for name in ("a", "b", "c")],
    "default_link": {"bandwidth_bytes_per_s": 1e8, "latency_s": 0.001},
}


async def in_process(job: Job, *, on_progress: Callable[[Doing], None] | None = None) -> Outcome:
    """What the planner's process answers, without the process."""

    # A clock that hardly moves: the search ends by its own budgets, the same on a slow machine.
    ticks = itertools.count(1)

    def plan(survive: int | None) -> Any:
        return plan_cluster(
            job.spec, seed=job.seed, time_limit_s=0.5, objective=job.objective, survive=survive,
            clock=lambda: next(ticks) * 1e-9,
        )  # fmt: skip

    if on_progress is not None:
        on_progress(Doing("plan", 0.1, 12.0, 24.0, "stages"))
    outcome = Outcome(plan(job.survive), final=True, unconstrained=plan(0) if job.price else None)
    for name in job.baselines:
        try:
            outcome.compared.append(Compared(name, baseline_plan(name, job.spec)))
        except Infeasible as error:
            outcome.compared.append(Compared(name, None, str(error)))
    if job.in_force is not None:
        outcome.in_force = in_force(Holding(job.spec), job.in_force)
    if job.frontier:
        outcome.depths = frontier(job.spec, time_limit_s=0.5)
    return outcome


@pytest.fixture(autouse=True)
def _no_process(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real" not in request.node.name:
        monkeypatch.setattr(command, "solve", in_process)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    file = tmp_path / "home.toml"
    file.write_text(HOME)
    return file


def small(tmp_path: Path, **changed: object) -> Path:
    """The small cluster as a file, with some keys changed (dotted, list numbers as words)."""
    data = copy.deepcopy(SMALL)
    for key, value in changed.items():
        *path, last = key.split("__")
        table: Any = data
        for name in path:
            table = table[int(name) if name.isdigit() else name]
        table[last] = value
    file = tmp_path / "small.json"
    file.write_text(json.dumps(data, indent=1))
    return file


def test_a_table_that_people_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(home)]) == Exit.OK
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("home: Qwen2.5-14B, 48 layers, 29.5 GB of weights, on 3 of 3 nodes")
    for text in ("max flow", "output tokens/s predicted", "one request", "a token crosses", "~RTX 4090", "datasheet"):
        assert text in printed.out
    rows = [line.split() for line in printed.out.splitlines() if line.startswith(("desk ", "old ", "laptop "))]
    assert len(rows) == 3
    # In the order of layers, the last one leads out.
    assert "out" in rows[-1]


def test_json_is_one_object_and_the_only_thing_on_stdout(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", str(home), "--json", "--compare", "--frontier", "--seed", "3", "--objective", "max-flow"]
    assert cli.main(asked) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    layers = [layer for start, end in found["placement"].values() for layer in range(start, end)]
    assert set(layers) == set(range(48))
    assert 0 < found["max_flow_tokens_per_s"] <= found["upper_bound_tokens_per_s"] * (1 + 1e-9)
    assert found["predicted_decode_tokens_per_s"] == found["prediction"]["decode_tokens_per_s"] > 0
    assert (found["objective"], found["seed"], found["estimated"]) == ("max-flow", 3, True)
    assert found["solve_s"] > 0
    assert 0 <= found["gap"] < 1
    source = sum(flow for _, flow in found["schedule"]["coordinator"])
    assert source == pytest.approx(found["max_flow_tokens_per_s"])
    assert set(found["nodes"]) == {"desk", "old", "laptop"}
    assert found["nodes"]["desk"]["layers"] == found["placement"]["desk"]
    assert set(found["compared"]) == {"helixd", *BASELINES}
    assert found["compared"]["milp"]["max_flow_tokens_per_s"] <= found["upper_bound_tokens_per_s"] * (1 + 1e-6)
    assert found["frontier"]


def test_what_it_prints_is_what_current_reads(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(home), "--json"]) == Exit.OK
    plan = tmp_path / "plan.json"
    plan.write_text(capsys.readouterr().out)
    assert cli.main(["plan", str(home), "--json", "--current", str(plan)]) == Exit.OK
    again = json.loads(capsys.readouterr().out)
    assert again["load_bytes"] == 0
    assert again["as_it_is"]["max_flow_tokens_per_s"] == pytest.approx(again["max_flow_tokens_per_s"])
    # One node held something else: what it lacks is to be loaded.
    held = json.loads(plan.read_text())
    held["placement"]["gone"] = [0, 4]
    first = min(held["placement"], key=lambda node: held["placement"][node] if node != "gone" else [99])
    end = held["placement"][first][1]
    held["placement"][first] = [1, end]
    plan.write_text(json.dumps(held))
    assert cli.main(["plan", str(home), "--current", str(plan)]) == Exit.OK
    printed = capsys.readouterr().out
    # Layer 0 and the embedding at least: how much depends on which node it is.
    assert re.search(r"\b\d+ nodes? loads?\b", printed)
    assert "to load" in printed


def test_tables_that_were_asked_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(home), "--compare", "--frontier"]) == Exit.OK
    printed = capsys.readouterr().out
    assert "flow against depth" in printed
    assert "other rules on this cluster" in printed
    rows = {line.split()[0] for line in printed.splitlines() if line}
    assert set(BASELINES) <= rows


def test_the_price_of_survival(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(small(tmp_path)), "--survive", "1"]) == Exit.INFEASIBLE
    assert "each of 4 layers must be held twice" not in capsys.readouterr().err
    four = [{"id": name, "type": "t"} for name in "abcd"]
    file = small(tmp_path, nodes=four)
    assert cli.main(["plan", str(file), "--survive", "1", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert found["survives_one_node"]
    assert found["without_survival"]["predicted_decode_tokens_per_s"] >= found["predicted_decode_tokens_per_s"] * 0.97
    assert cli.main(["plan", str(file), "--survive", "1"]) == Exit.OK
    printed = capsys.readouterr().out
    assert "any one node may be lost" in printed
    assert "its price" in printed


def test_a_picture(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    assert cli.main(["plan", str(home), "--svg", str(picture)]) == Exit.OK
    root = ET.fromstring(picture.read_text())
    assert root.tag.endswith("svg")
    text = " ".join(root.itertext())
    for word in ("home", "desk", "laptop", "~RTX 3060", "tokens/s", "layer"):
        assert word in text
    assert len(root.findall("{*}path")) == 2
    assert cli.main(["plan", str(home), "--svg", str(tmp_path)]) == Exit.CANNOT_WRITE
    assert "cannot be written" in capsys.readouterr().err


def test_a_picture_of_hostile_names_is_still_xml(tmp_path: Path) -> None:
    file = small(tmp_path, name="<b>&", nodes__0__id='"><script>')
    picture = tmp_path / "plan.svg"
    assert cli.main(["plan", str(file), "--svg", str(picture)]) == Exit.OK
    assert '"><script>' in " ".join(ET.fromstring(picture.read_text()).itertext())


def test_hostile_names_are_not_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(small(tmp_path, nodes__0__id="[red]x[/red]"))]) == Exit.OK
    assert "[red]x[/red]" in capsys.readouterr().out


def test_a_checkpoint_in_place_of_the_files_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(home), "--model", "demo", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["num_layers"]) == ("demo", 12)
    assert found["alone"]["node"] in {"desk", "old", "laptop"}
    assert cli.main(["plan", str(home), "--model", "/nowhere"]) == Exit.BAD_MODEL
    assert "is not a directory" in capsys.readouterr().err


def test_a_cluster_without_a_model_takes_a_checkpoint(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin, end = HOME.index("[model]"), HOME.index("[default_link]")
    home.write_text(HOME[:begin] + HOME[end:])
    assert cli.main(["plan", str(home)]) == Exit.BAD_DATA
    assert "model: is missing" in capsys.readouterr().err
    assert cli.main(["plan", str(home), "--model", "demo"]) == Exit.OK


def test_measured_times_are_scaled_for_another_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(small(tmp_path)), "--model", "demo", "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert found["estimated"]
    assert all(node["estimated"] for node in found["nodes"].values())


@pytest.mark.parametrize(
    ("changed", "line", "said"),
    [
        ({"nodes__1__type": "x"}, 57, "nodes[1].type: 'x' is not in node_types (t)"),
        ({"nodes__2__id": "a"}, 60, "nodes[2].id: 'a' occurs twice"),
        ({"model__num_layers": 0}, 6, "model.num_layers: must be at least 1, is 0"),
        ({"node_types__t__memory_bytes": "big"}, 14, "node_types.t.memory_bytes: must be a number, is a string"),
        ({"node_types__t__max_layers": 4}, 16, "kv_capacity_token_layers: has 3 values, max_layers is 4"),
        ({"nodes__0__fixed_range": [2, 9]}, 55, "nodes[0].fixed_range: [2, 9) is not a range of the model's 4 layers"),
        ({"format": "helixd-cluster/2"}, 2, "format: is 'helixd-cluster/2'; this version reads 'helixd-cluster/1'"),
        ({"nodes__0__hardware": "L4"}, 55, "nodes[0].hardware: is said of type 't'"),
        ({"links": [["a", "z", 1, 1]]}, None, "links[0]: 'z' is neither a node's id nor 'coordinator'"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_key(
    changed: dict[str, object], line: int | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = small(tmp_path, **changed)
    assert cli.main(["plan", str(file)]) == Exit.BAD_DATA
    printed = capsys.readouterr()
    assert printed.out == ""
    (only,) = printed.err.splitlines()
    assert said in only
    if line is not None:
        text = file.read_text().splitlines()
        named = int(only.split(":")[2])
        assert said.split(":")[0].split(".")[-1].split("[")[0] in text[named - 1], (named, text[named - 1])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("c.json", '{\n "format": "x",\n}', "c.json:3: not valid JSON"),
        ("c.toml", 'format = "x"\nname = \n', "c.toml:2: not valid TOML"),
        ("c.toml", 'format = "x"\nname = "', "c.toml:2: not valid TOML"),
        ("c", 'format = "x"\n= 1', "c:2: not valid TOML"),
        ("c", '{"format": 1', "c:1: not valid JSON"),
        ("c.json", "[1]", "c.json: must hold a table"),
        ("c.json", "\ud800", "is not UTF-8"),
    ],
)
def test_a_file_that_is_not_what_it_says(
    name: str, text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert cli.main(["plan", str(file)]) == Exit.BAD_DATA
    (only,) = capsys.readouterr().err.splitlines()
    assert said in only


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tmp_path / "none.toml")]) == Exit.NO_INPUT
    assert capsys.readouterr().err.endswith("none.toml: cannot be read: No such file or directory\n")


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("{}", "placement: is missing"),
        ('{"placement": {"a": [3, 2]}}', "placement.a: must be [start, end), is [3, 2]"),
        ('{"placement": {"a": 3}}', "placement.a: must be [start, end), is 3"),
        ('{"placement": {"a": [0.5, 2]}}', "placement.a: must be [start, end), is [0.5, 2]"),
        ('{"placement": {"a": [0, 5]}}', "placement.a: [0, 5) is not a range of the model's 4 layers"),
        ('{"placement": {"z": [0, 4]}}', "none of its nodes is in cluster small"),
        ("{", "not valid JSON"),
    ],
)
def test_a_current_plan_that_makes_no_sense(
    plan: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    file.write_text(plan)
    assert cli.main(["plan", str(small(tmp_path)), "--current", str(file)]) == Exit.BAD_DATA
    (only,) = capsys.readouterr().err.splitlines()
    assert said in only


def test_keys_that_mean_nothing_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small(tmp_path, nodes__1__exlude=True, notes="mine")
    assert cli.main(["plan", str(file)]) == Exit.OK
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert any("nodes[1].exlude: is not a key of this format and was ignored; did you mean exclude?" in s for s in said)
    assert any(s.endswith("notes: is not a key of this format and was ignored; did you mean nodes?") for s in said)


def test_too_little_memory_is_said_in_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = small(tmp_path, nodes=[{"id": "a", "type": "t"}])
    assert cli.main(["plan", str(file)]) == Exit.INFEASIBLE
    (only,) = capsys.readouterr().err.splitlines()
    assert "needs 3.7 GiB for weights, nodes offer 2.8 GiB" in only


def test_pins_and_headroom_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [
        {"id": "a", "type": "t", "fixed_range": [1, 3]},
        {"id": "b", "type": "t", "max_layers": 2},
        {"id": "c", "type": "t", "exclude": True},
        {"id": "d", "type": "t", "memory_headroom_bytes": 1.5e9},
        {"id": "e", "type": "t"},
    ]
    assert cli.main(["plan", str(small(tmp_path, nodes=nodes)), "--json"]) == Exit.OK
    found = json.loads(capsys.readouterr().out)
    held = {node: end - start for node, (start, end) in found["placement"].items()}
    assert found["placement"]["a"] == [1, 3]
    assert held.get("b", 0) <= 2
    assert "c" not in held
    assert found["nodes"]["c"]["note"] == "idle: excluded by configuration"
    # A layer less fits beside 1.5 GB that stay free.
    assert held.get("d", 0) <= 1 or found["nodes"]["d"]["kv_tokens"] > 0


def test_a_search_that_broke_off_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def cut_off(job: Job, *, on_progress: object = None) -> Outcome:
        outcome = await in_process(job)
        outcome.final, outcome.cut_off = False, "the planner's process ended with status -9"
        return outcome

    monkeypatch.setattr(command, "solve", cut_off)
    assert cli.main(["plan", str(small(tmp_path))]) == Exit.OK
    assert "the planner's process ended with status -9" in capsys.readouterr().out
    assert cli.main(["plan", str(small(tmp_path)), "--json"]) == Exit.OK
    assert json.loads(capsys.readouterr().out)["cut_off"] == "the planner's process ended with status -9"


@pytest.mark.parametrize(
    ("error", "status"),
    [(PlannerFailed("status -11"), Exit.INTERNAL), (KeyboardInterrupt(), Exit.INTERRUPTED)],
)
def test_a_search_without_a_plan(
    error: BaseException, status: Exit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def fail(_main: Any) -> None:
        _main.close()
        raise error

    monkeypatch.setattr(command.asyncio, "run", fail)
    assert cli.main(["plan", str(small(tmp_path))]) == status
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["f", "--time-limit", "0"], ["f", "--time-limit", "soon"], ["f", "--survive", "2"], ["f", "--objective", "x"]],
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", *arguments])
    assert caught.value.code == Exit.USAGE
    assert "usage: helixd plan CLUSTER" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["plan", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for text in ("helixd plan cluster.toml", "--survive 1", "docs/planning.md", "KV tokens", "exit status"):
        assert text in printed
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "helixd plan" in capsys.readouterr().out


@pytest.mark.parametrize(("text", "seconds"), [("5", 5), ("0.5", 0.5), ("2m", 120), ("500ms", 0.5)])
def test_time_limits_as_people_write_them(text: str, seconds: float) -> None:
    assert command.build_parser().parse_args(["f", "--time-limit", text]).time_limit == seconds


class Terminal:
    """A terminal that keeps what is written."""

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_progress_is_for_terminals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert cli.main(["plan", str(small(tmp_path)), "--json"]) == Exit.OK
    assert "plan: flow 12.0 of at most 24.0 tokens/s, gap 50.0% (stages)" in terminal.text
    assert terminal.text.endswith("\r\x1b[K")
    json.loads(capsys.readouterr().out)


def test_a_real_process_prints_json_and_nothing_else(tmp_path: Path) -> None:
    file = small(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "helixd", "plan", str(file), "--json", "--time-limit", "1"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert ended.stderr == ""
    assert set(json.loads(ended.stdout)["placement"]) <= {"a", "b", "c"}


def test_a_real_search_ends_with_ctrl_c(tmp_path: Path) -> None:
    """Nothing is left behind, and nothing is printed but a word."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import os, sys, time\nsys.stdin.buffer.read()\nopen(os.environ['PIDFILE'], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)\n"
    )
    script = (
        "import sys\nfrom helixd.solver import process\n"
        f"process.COMMAND = (sys.executable, {str(slow)!r})\n"
        f"from helixd.cli import main\nsys.exit(main(['plan', {str(small(tmp_path))!r}]))"
    )
    pidfile = tmp_path / "pid"
    searching = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PIDFILE": str(pidfile)},
    )  # fmt: skip
    with searching:
        while not (pidfile.exists() and pidfile.read_text()):
            time.sleep(0.02)
        searching.send_signal(signal.SIGINT)
        out, err = searching.communicate(timeout=30)
    assert (searching.returncode, out, err) == (Exit.INTERRUPTED, "", "helixd plan: interrupted\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pidfile.read_text()), 0)


def test_a_reader_that_has_enough_is_no_error_really(tmp_path: Path) -> None:
    file = small(tmp_path)
    ended = subprocess.run(
        f"{sys.executable} -m helixd plan {file} --time-limit 1 | head -c 1",
        shell=True, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert ended.stderr == ""


def test_jobs_survive_the_wire(tmp_path: Path) -> None:
    from helixd.commands.cluster_source import load_cluster

    job = Job(load_cluster(small(tmp_path)), baselines=("swarm",))
    assert msgspec.json.decode(msgspec.json.encode(job), type=Job) == job


def test_a_real_search_moves_only_what_pays_within_the_horizon(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(home), "--json"]) == Exit.OK
    held = json.loads(capsys.readouterr().out)
    # The first two boundaries are elsewhere: it serves, but less than it could.
    first, second = sorted(held["placement"], key=lambda node: held["placement"][node])[:2]
    assert held["placement"][first][0] == 0
    held["placement"][first][1] -= 2
    held["placement"][second][0] -= 2
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(held))
    found = []
    for horizon in ("1s", "100h"):
        arguments = ["plan", str(home), "--json", "--current", str(plan), "--horizon", horizon, "--load-speed", "1MiB"]
        assert cli.main(arguments) == Exit.OK
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["load_bytes"] == 0
    assert found[0]["load_s"] == 0
    assert found[1]["predicted_decode_tokens_per_s"] >= found[0]["predicted_decode_tokens_per_s"]
    assert [way["load_bytes"] for way in found[1]["ways_on"]] == sorted(
        way["load_bytes"] for way in found[1]["ways_on"]
    )


@pytest.mark.parametrize("flags", [["--load-speed", "0"], ["--load-speed", "fast"], ["--horizon", "0"]])
def test_loading_needs_a_speed_and_a_time(home: Path, flags: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(home), *flags])
    assert ended.value.code == Exit.USAGE
