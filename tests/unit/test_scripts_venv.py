"""scripts/lib.sh: which torch it asks pip for, and when it installs. pip is a stand-in that notes what it was asked."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="only Linux has separate CPU wheels of torch to choose"),
    pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has an NVIDIA GPU, so it takes any torch"),
    pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="pip is not installed"),
]

PYTHON = """\
#!/usr/bin/env bash
if [ "$1" = -m ] && [ "$2" = pip ]; then
    echo "$*" >>"{log}"
    if [ "$3" = index ]; then cat "{offered}"; fi
    exit 0
fi
exec "{real}" "$@"
"""


class Project:
    """A copy of what lib.sh reads, with a .venv whose pip is a stand-in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.offered = path / "offered"
        self.log = path / "log"
        (path / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "lib.sh", path / "scripts")
        shutil.copy(ROOT / "pyproject.toml", path)
        python = path / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON.format(log=self.log, offered=self.offered, real=sys.executable))
        python.chmod(0o755)
        (path / "bin").mkdir()

    def offer(self, *versions: str) -> None:
        self.offered.write_text(f"torch ({versions[0]})\nAvailable versions: {', '.join(versions)}\n  LATEST: 1\n")

    def bash(self, script: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"source scripts/lib.sh; {script}"],
            cwd=self.path, env={"PATH": f"{self.path / 'bin'}:{os.environ['PATH']}", **env},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def installs(self) -> list[str]:
        """What pip was asked to install so far."""
        calls = self.log.read_text().splitlines() if self.log.exists() else []
        return [call for call in calls if call.startswith("-m pip install")]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    made = Project(tmp_path)
    (made.path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (made.path / "bin" / "nvidia-smi").chmod(0o755)
    return made


def test_the_newest_cpu_wheel_that_the_project_allows(project: Project) -> None:
    project.offer("3.1.0+cpu", "2.99.0", "2.13.0+cpu", "2.13.0", "2.12.0+cpu", "2.5.0+cpu")
    ended = project.bash("torch_requirement")
    assert (ended.returncode, ended.stdout) == (0, "torch==2.13.0+cpu\n")


def test_without_a_cpu_wheel_it_stops_and_says_how_to_get_one(project: Project) -> None:
    project.offer("2.13.0", "2.12.0+cu126", "2.5.0+cpu")
    ended = project.bash("torch_requirement")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "PIP_EXTRA_INDEX_URL" in ended.stderr
    assert "HELIXD_TORCH=default" in ended.stderr
    assert project.bash("torch_requirement", HELIXD_TORCH="default").stdout == "torch\n"


def test_pip_that_offers_nothing_is_no_cpu_wheel(project: Project) -> None:
    project.offered.write_text("")
    assert project.bash("torch_requirement").returncode == 1


def test_with_a_gpu_any_torch_will_do(project: Project) -> None:
    project.offer("2.13.0+cpu")
    (project.path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 0\n")
    assert project.bash("torch_requirement").stdout == "torch\n"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_installs_once_per_pyproject_and_keeps_the_torch_it_finds(project: Project) -> None:
    assert project.bash("ensure_venv dev").returncode == 0
    (install,) = project.installs()
    assert install.endswith("--editable .[dev]")
    assert "--constraint .venv/.helixd-constraints" in install
    assert (project.path / ".venv" / ".helixd-constraints").read_text().startswith("torch==")

    assert project.bash("ensure_venv dev; ensure_venv").returncode == 0
    assert len(project.installs()) == 1

    with (project.path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert project.bash("ensure_venv").returncode == 0
    assert project.installs()[1:] == [install.replace(".[dev]", ".")]
    assert project.bash("ensure_venv dev").returncode == 0
    assert len(project.installs()) == 3


def test_a_python_that_is_too_old_is_refused_by_name(project: Project) -> None:
    (project.path / "bin" / "python-old").write_text("#!/bin/sh\nexit 1\n")
    (project.path / "bin" / "python-old").chmod(0o755)
    shutil.rmtree(project.path / ".venv")
    ended = project.bash("ensure_venv", HELIXD_PYTHON="python-old")
    assert ended.returncode == 1
    assert "needs Python 3.11 or later" in ended.stderr
    assert "python-old" in ended.stderr
    assert not (project.path / ".venv").exists()
