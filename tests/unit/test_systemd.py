"""The systemd unit and its installer: hardened, true to the daemon's statuses, never over a configuration."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helixd.config import Override, load
from helixd.config.checks import MIN_SECRET_BYTES
from helixd.exits import Exit

HERE = Path(__file__).parents[2] / "scripts" / "systemd"
UNIT = (HERE / "helixd.service").read_text(encoding="utf-8")
EXPOSURE_LIMIT = 2.0
analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def install(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = [HERE / "install", "--root", root, "--helixd", "/bin/true", *arguments]
    return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60, check=False)


def settings(key: str) -> list[str]:
    return re.findall(rf"^{key}=(.*)$", UNIT, re.MULTILINE)


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a command that exists here."""
    path = tmp_path / "helixd.service"
    path.write_text(UNIT.replace("ExecStart=/usr/bin/helixd", "ExecStart=/bin/true"))
    return path


@analyze
def test_the_unit_is_hardened(unit: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for helixd.service: ([\d.]+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd-analyze cannot judge a file: {done.stderr.strip()}")
    assert float(found[1]) <= EXPOSURE_LIMIT


@analyze
def test_the_unit_has_no_mistakes(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_gpu_is_left_reachable() -> None:
    assert not settings("PrivateDevices")
    assert not settings("MemoryDenyWriteExecute")
    assert not settings("ProcSubset")
    allowed = " ".join(settings("DeviceAllow"))
    for kind in ("char-nvidia ", "char-nvidiactl ", "char-nvidia-uvm ", "char-drm ", "/dev/kfd "):
        assert kind in allowed


def test_statuses_that_do_not_go_away_end_it_for_good() -> None:
    [listed] = settings("RestartPreventExitStatus")
    assert set(map(int, listed.split())) == {Exit.USAGE, Exit.BAD_MODEL, Exit.REJECTED, Exit.CONFIG}


def test_stopping_outlasts_the_default_drain(tmp_path: Path) -> None:
    config = load([Override("model.path", "demo", "--model")], {"HOME": str(tmp_path)}, Path("/dev/null")).config
    assert float(settings("TimeoutStopSec")[0]) > config.cluster.timers.drain_s
    # The watchdog must not end a daemon whose loop may lag and still be petted.
    assert float(settings("WatchdogSec")[0]) >= 30


def test_installing_twice_changes_nothing_the_second_time(tmp_path: Path) -> None:
    first = install(tmp_path)
    assert first.returncode == 0, first.stderr
    files = {path.relative_to(tmp_path): path for path in tmp_path.rglob("*") if path.is_file()}
    modes = {str(name): path.stat().st_mode & 0o777 for name, path in files.items()}
    assert modes == {
        "etc/helixd/helixd.toml": 0o640,
        "etc/helixd/cluster.secret": 0o600,
        "etc/systemd/system/helixd.service": 0o644,
        "etc/sysusers.d/helixd.conf": 0o644,
        "etc/tmpfiles.d/helixd.conf": 0o644,
    }
    texts = {name: path.read_bytes() for name, path in files.items()}
    assert b"ExecStart=/bin/true --config /etc/helixd/helixd.toml\n" in texts[Path("etc/systemd/system/helixd.service")]
    assert len(texts[Path("etc/helixd/cluster.secret")].strip()) >= MIN_SECRET_BYTES
    second = install(tmp_path)
    assert second.returncode == 0
    assert {name: path.read_bytes() for name, path in files.items()} == texts
    assert "installed" not in second.stderr


def test_a_configuration_and_a_secret_are_never_overwritten_and_an_old_unit_is(tmp_path: Path) -> None:
    install(tmp_path)
    for name in ("helixd.toml", "cluster.secret"):
        (tmp_path / "etc/helixd" / name).write_text("mine")
    unit = tmp_path / "etc/systemd/system/helixd.service"
    unit.write_text("old")
    assert install(tmp_path).returncode == 0
    assert {path.read_text() for path in (tmp_path / "etc/helixd").iterdir()} == {"mine"}
    assert "WatchdogSec" in unit.read_text()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("--helixd", "bin/helixd"), "the whole path"),
        (("--helixd", "/nowhere/helixd"), "there is no command /nowhere/helixd"),
        (("--helixd", "/bin/true x"), "systemd would read"),
        (("--helixd",), "needs a value"),
        (("--start",), "unknown argument --start"),
    ],
)
def test_what_cannot_be_installed_is_said_and_nothing_written(
    arguments: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    done = install(tmp_path, *arguments)
    assert done.returncode == 1
    assert why in done.stderr
    assert list(tmp_path.iterdir()) == []
