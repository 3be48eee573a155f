"""The helixd command: what it prints, and with which status it ends."""

import json
import logging
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import helixd
from helixd import cli
from helixd.config import Config
from helixd.config.load import SCHEMA
from helixd.errors import ConfigError, ModelError
from helixd.exits import Exit

DaemonRun = Callable[[Config, Callable[[], Config]], int]


@pytest.fixture(autouse=True)
def _quiet_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No configuration of this machine, and the root logger as it was."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HELIXD_CONFIG", "/dev/null")
    monkeypatch.setenv("HELIXD_NODE__STATE_DIR", str(tmp_path / "state"))
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch) -> Callable[[DaemonRun], None]:
    """Put a function in place of the daemon."""

    def install(run: DaemonRun) -> None:
        module = types.ModuleType("helixd.daemon")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "helixd.daemon", module)

    return install


def test_flags_reach_the_daemon(daemon: Callable[[DaemonRun], None], tmp_path: Path) -> None:
    seen: list[Config] = []
    daemon(lambda config, _read: seen.append(config) or 0)
    arguments = "--model demo --name a --listen 127.0.0.1:1 --peer-listen 127.0.0.1:2 --memory 1GiB --device cuda:0 cpu"
    assert cli.main([*arguments.split(), "--set", "log.level = error", "--set=engine.kv_fraction=0.5"]) == Exit.OK
    (config,) = seen
    assert (config.model.path, config.node.name, config.device.devices) == ("demo", "a", ("cuda:0", "cpu"))
    assert (config.api.listen.port, config.cluster.listen.port, config.device.memory_bytes) == (1, 2, 2**30)
    assert (config.log.level, config.engine.kv_fraction) == ("error", 0.5)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_a_worker_from_flags(daemon: Callable[[DaemonRun], None], tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s" * 40)
    secret.chmod(0o600)
    seen: list[Config] = []
    daemon(lambda config, _read: seen.append(config) or 0)
    arguments = f"--role worker --coordinator 10.0.0.1:7070 --secret-file {secret} --state-dir {tmp_path / 'w'}"
    assert cli.main(arguments.split()) == Exit.OK
    assert (str(seen[0].cluster.coordinator), seen[0].cluster.secret_file) == ("10.0.0.1:7070", secret)
    assert seen[0].node.state_dir == tmp_path / "w"


def _raises(error: BaseException) -> DaemonRun:
    def run(_config: Config, _read: Callable[[], Config]) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "status"),
    [
        (lambda _config, _read: 0, 0),
        (lambda _config, _read: Exit.REJECTED, 77),
        (_raises(ModelError("tensor x is missing")), 65),
        (_raises(ConfigError("no such device cuda:9")), 78),
        (_raises(RuntimeError("a bug")), 70),
        (_raises(KeyboardInterrupt()), 130),
    ],
)
def test_the_daemons_end_is_the_status(
    run: DaemonRun, status: int, daemon: Callable[[DaemonRun], None], capsys: pytest.CaptureFixture[str]
) -> None:
    daemon(run)
    assert cli.main(["--model", "demo"]) == status
    printed = capsys.readouterr().err
    assert ("a bug" in printed) == (status == 70)
    assert ("tensor x is missing" in printed) == (status == 65)
    assert ("no such device" in printed) == (status == 78)


def test_a_state_directory_that_takes_no_files(
    tmp_path: Path, daemon: Callable[[DaemonRun], None], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    daemon(lambda _config, _read: pytest.fail("the daemon must not start"))
    assert cli.main(["--model", "demo", "--state-dir", str(tmp_path / "file" / "below")]) == Exit.STATE_NOT_WRITABLE
    assert "state_not_writable" in capsys.readouterr().err


def test_bad_configuration_ends_with_every_problem(capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ([], ["--check-config"], ["--print-config"]):
        assert cli.main(["--role", "boss", "--memory", "big", "--set", "novalue", *extra]) == Exit.CONFIG
        printed = capsys.readouterr()
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert [line.split(":")[1] for line in lines[:3]] == [" --set novalue", " --role", " --memory"]


def test_nothing_given_is_told_the_first_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HELIXD_CONFIG", "")
    monkeypatch.setattr("helixd.config.sources.SYSTEM_FILE", tmp_path / "none")
    monkeypatch.setattr(cli, "find_file", lambda env, explicit: None)
    assert cli.main([]) == Exit.CONFIG
    printed = capsys.readouterr().err
    assert "a coordinator needs model.path" in printed
    assert '"helixd --model demo"' in printed
    assert cli.main(["--role", "coordinator"]) == Exit.CONFIG
    assert "no configuration file" not in capsys.readouterr().err


def test_ctrl_c_while_the_daemon_is_imported_ends_it_without_a_trace() -> None:
    script = (
        "import sys, time\nfrom helixd.cli import main\n"
        "class Slow:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'helixd.daemon':\n"
        "            print('importing', flush=True)\n            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\nmain(['--model', 'demo'])"
    )
    command = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    with command:
        assert command.stdout is not None
        assert command.stdout.readline() == "importing\n"
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=30)
    assert command.returncode == -signal.SIGINT
    assert err == ""


def test_check_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.toml"
    file.write_text('model.path = "demo"\n')
    assert cli.main(["--check-config", "--config", str(file)]) == Exit.OK
    assert capsys.readouterr().out == f"{file}: OK\n"
    file.write_text('\n\nmodle.path = "demo"\n')
    assert cli.main(["--check-config", "--config", str(file)]) == Exit.CONFIG
    assert f"{file}:3: unknown key" in capsys.readouterr().err


def test_print_config_names_origins(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HELIXD_LOG__LEVEL", "debug")
    assert cli.main(["--model", "demo", "--print-config"]) == Exit.OK
    printed = capsys.readouterr().out
    assert 'level = "debug"  # $HELIXD_LOG__LEVEL' in printed
    assert 'path = "demo"  # --model' in printed


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == Exit.OK
    assert capsys.readouterr().out.startswith(f"helixd {helixd.__version__} (protocol ")
    assert cli.main(["--version", "--json"]) == Exit.OK
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"helixd", "protocol", "python", "torch"}
    assert facts["helixd"] == helixd.__version__


@pytest.mark.parametrize("arguments", [["--json"], ["--no-such-flag"], ["positional"], ["--mod", "demo"], ["--config"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == Exit.USAGE
    assert "usage: helixd" in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for text in ("helixd --model demo", "--role worker --coordinator", "--check-config", "exit status"):
        assert text in printed
    for key in ("model.path", "api.listen", "cluster.listen", "device.memory"):
        assert f"[{key}]" in printed


def test_every_flag_names_a_key_that_exists() -> None:
    dotted = {".".join(path) for path in SCHEMA.keys}
    flags = [action for action in cli.build_parser()._actions if "." in action.dest or action.dest == "role"]
    assert len(flags) == 12
    assert {action.dest for action in flags} <= dotted


def test_the_command_answers_without_the_daemons_libraries() -> None:
    script = (
        "import sys\nfrom helixd.cli import main\nassert main(['--model', 'demo', '--check-config']) == 0\n"
        "print(sorted({'torch', 'aiohttp', 'numpy', 'rich', 'transformers'} & set(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_python_dash_m_is_the_command() -> None:
    ended = subprocess.run([sys.executable, "-m", "helixd", "--version"], capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("helixd ")
