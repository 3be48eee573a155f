"""The doors between the rooms: who may import whom, and what the pure rooms may not touch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "helixd"

# What a room may import of the house, besides itself and the shared words (ids, layers, errors, sampling, logs, tls).
SHARED = {"ids", "layers", "errors", "sampling", "logs", "tls", "files"}
MAY = {
    "model": set(),
    "plan": set(),
    "route": {"plan"},
    "protocol": {"model", "plan", "wire"},
    "engine": {"model"},
    "wire": {"protocol"},
    "worker": {"engine", "wire", "model", "protocol"},
    "solver": {"plan", "sim"},
    "coordinator": {"plan", "route", "solver", "wire", "model", "protocol"},
    "api": {"coordinator", "model"},
    "config": set(),
    "service": set(),
    "sim": {"plan", "route"},
    "emulation": {"engine", "model", "plan", "worker"},
    "commands": {"plan", "sim", "solver", "model", "config", "exits"},
}
# The same inside the planner: what a part of it may import of `helixd.plan`.
INSIDE_PLAN = {
    "cluster": {"cluster"},
    "graph": {"cluster", "graph", "plan"},
    "search": {"cluster", "graph", "search", "plan", "bounds", "holding", "milp", "predict"},
    "baselines": {"cluster", "graph", "baselines", "plan", "holding", "milp", "judge"},
}
CLOCKS = {"time", "datetime", "asyncio", "threading", "socket", "subprocess", "aiohttp", "uvloop", "torch"}
NEVER = {
    "plan": CLOCKS,
    "route": CLOCKS,
    "sim": CLOCKS,
    "engine": {"socket", "asyncio", "aiohttp", "ssl"},
    "model": {"torch", "asyncio", "aiohttp", "socket"},
    "wire": {"torch"},
    "coordinator": {"torch"},
    "solver": {"torch", "socket", "aiohttp"},
    "commands": {"torch", "socket", "aiohttp"},
    "api": {"torch"},
    "emulation": {"torch"},
}
ANYWHERE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in the file, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("room", sorted(MAY))
def test_imports_point_one_way(room: str) -> None:
    allowed = MAY[room] | SHARED | {room}
    for path in (ROOT / room).rglob("*.py"):
        for name in imports(path):
            if name.startswith("helixd.") and name != "helixd.__version__":
                other = name.split(".")[1]
                assert other in allowed, f"{path.relative_to(ROOT)} imports {name}: {room} may not know {other}"


@pytest.mark.parametrize("part", sorted(INSIDE_PLAN))
def test_the_planners_parts_point_one_way(part: str) -> None:
    for path in (ROOT / "plan" / part).rglob("*.py"):
        for name in imports(path):
            words = name.split(".")
            if words[:2] == ["helixd", "plan"] and words[2:]:
                assert words[2] in INSIDE_PLAN[part], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("room", sorted(NEVER))
def test_rooms_keep_out_what_is_not_theirs(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & NEVER[room], f"{path.relative_to(ROOT)} imports {sorted(tops & NEVER[room])}"


@pytest.mark.parametrize("room", ["plan", "route", "sim"])
def test_chance_in_the_pure_rooms_comes_from_a_seed(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        used = imports(path)
        assert "random" not in used, f"{path}: import Random, not the module with its global state"
        assert all(name == "random.Random" for name in used if name.startswith("random.")), path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Random":
                assert node.args, f"{path}:{node.lineno}: Random() without a seed"


def test_nothing_imports_torch_before_a_device_computes() -> None:
    """A coordinator, and a worker that computes elsewhere, start in a fraction of torch's time and memory."""
    script = "import sys, helixd.daemon, helixd.worker.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_no_code_from_data_anywhere() -> None:
    for path in sources():
        assert not {name.split(".")[0] for name in imports(path)} & ANYWHERE, path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "torch.load", "time.time"}, f"{path}:{node.lineno}: {name}"


def test_no_file_outgrows_its_concept() -> None:
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def test_every_room_is_known_to_this_test() -> None:
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and (path / "__init__.py").exists()}
    assert rooms - {"demo"} <= set(MAY), f"say what {sorted(rooms - set(MAY))} may import"
