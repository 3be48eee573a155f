# Shared by the scripts in this directory; source it from the repository's root. It defines functions and runs nothing.
#
# ensure_venv [EXTRA]   make or update .venv with helixd and its dependencies (EXTRA: an extra of pyproject.toml, such as
#                       dev). Does nothing if that was done for the present pyproject.toml.
#
# HELIXD_VENV    an environment to use as it is, instead of .venv: nothing is made or installed
# HELIXD_PYTHON  the Python to make .venv with (default: the first of python3, python3.11 ... that is 3.11 or later)
# HELIXD_TORCH   "default": where pip offers no CPU-only torch, take the default one, gigabytes of CUDA libraries included

VENV=${HELIXD_VENV:-.venv}

say() { printf '%s\n' "$*" >&2; }

fail() {
    say "$*"
    exit 1
}

find_python() {
    local candidate
    for candidate in ${HELIXD_PYTHON:-python3 python3.11 python3.12 python3.13 python3.14}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "helixd needs Python 3.11 or later with its venv module; ${HELIXD_PYTHON:-python3} is not that.
Install one (on Debian and Ubuntu: apt install python3 python3-venv) or name one: HELIXD_PYTHON=/path/to/python3.12"
}

has_nvidia_gpu() {
    [ -e /dev/nvidia0 ] || { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }
}

# The newest CPU-only torch that pip offers and pyproject.toml allows; nothing if there is none. Downloads nothing.
cpu_torch_version() {
    { "$VENV/bin/python" -m pip index versions torch 2>/dev/null || true; } | "$VENV/bin/python" -c '
import re, sys, tomllib
from pip._vendor.packaging.requirements import Requirement

with open("pyproject.toml", "rb") as file:
    requirements = map(Requirement, tomllib.load(file)["project"]["dependencies"])
allowed = next(requirement.specifier for requirement in requirements if requirement.name == "torch")
offered = re.search(r"^Available versions: (.*)$", sys.stdin.read(), re.MULTILINE)
versions = offered.group(1).split(", ") if offered else []
print(next((version for version in versions if version.endswith("+cpu") and version in allowed), ""))'
}

# What to ask pip for. Without an NVIDIA GPU on Linux, the default wheel would bring gigabytes of unusable CUDA libraries.
torch_requirement() {
    local version
    if [ "$(uname -s)" != Linux ] || has_nvidia_gpu; then
        printf 'torch\n'
        return
    fi
    version=$(cpu_torch_version)
    if [ -n "$version" ]; then
        printf 'torch==%s\n' "$version"
    elif [ "${HELIXD_TORCH:-}" = default ]; then
        printf 'torch\n'
    else
        fail "This machine has no NVIDIA GPU, and pip offers no CPU-only torch; the default one brings gigabytes of CUDA libraries.
Point pip at PyTorch's index of CPU wheels (its address is in the install selector on PyTorch's site) and try again:
  PIP_EXTRA_INDEX_URL=ADDRESS $0
or take the default one: HELIXD_TORCH=default $0"
    fi
}

ensure_venv() {
    local extra=${1:-} stamp wanted python requirement constraints
    if [ -n "${HELIXD_VENV:-}" ]; then
        [ -x "$VENV/bin/python" ] || fail "HELIXD_VENV is $VENV, but there is no $VENV/bin/python"
        return
    fi
    stamp=$VENV/.helixd-installed${extra:+-$extra}
    if [ ! -x "$VENV/bin/python" ] || ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        say "Making $VENV with $("$python" --version)"
        "$python" -m venv --clear "$VENV"
    fi
    wanted=$("$VENV/bin/python" -c '
import hashlib, sys
print(hashlib.sha256(open("pyproject.toml", "rb").read() + sys.version.encode()).hexdigest())')
    if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
        return
    fi
    "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$VENV holds $("$VENV/bin/python" --version), older than 3.11; remove $VENV and try again"
    if ! "$VENV/bin/python" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
        requirement=$(torch_requirement) || exit 1
        say "Installing $requirement"
        "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$requirement"
    fi
    say "Installing helixd${extra:+[$extra]} and its dependencies (minutes, the first time)"
    constraints=$VENV/.helixd-constraints
    "$VENV/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >"$constraints"
    "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --constraint "$constraints" \
        --editable ".${extra:+[$extra]}"
    printf '%s\n' "$wanted" >"$stamp"
    # Every extra contains the plain installation.
    printf '%s\n' "$wanted" >"$VENV/.helixd-installed"
}
