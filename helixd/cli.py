"""The helixd command: flags to configuration, then the daemon. Decides exit statuses; knows nothing of serving.

What needs no daemon (--help, --version, --check-config, --print-config) imports none of it and answers at once.
"""

import argparse
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helixd
from helixd import logs
from helixd.config import Config, ConfigErrors, Override, load
from helixd.config.document import documented_defaults, effective
from helixd.config.sources import find_file
from helixd.errors import ConfigError, ModelError
from helixd.exits import Exit

logger = logging.getLogger(__name__)

DESCRIPTION = """\
Serve one language model over unequal machines. A coordinator owns the HTTP API and the plan; workers hold layers and
compute. Without --role one process is both, which is all that one machine needs."""

EXAMPLES = """\
one machine, with the small model in the package, then a request:
  helixd --model demo
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "demo", "prompt": "def main(", "max_tokens": 40}'

a cluster: the coordinator on one host, a worker on each of the others, the same secret file on all:
  helixd --role coordinator --model /srv/models/llama --peer-listen 0.0.0.0:7070 --secret-file secret
  helixd --role worker --coordinator 10.0.0.1:7070 --secret-file secret

a configuration file: write one with every key and its default, change it, check it, use it:
  helixd --print-defaults > helixd.toml
  helixd --config helixd.toml --check-config
  helixd --config helixd.toml

Flags beat environment variables (HELIXD_SECTION__KEY), which beat the file, which beats defaults. Without --config the
file is $HELIXD_CONFIG, $XDG_CONFIG_HOME/helixd/helixd.toml (not for root) or /etc/helixd/helixd.toml.

SIGTERM and SIGINT let running requests end before the daemon does, SIGHUP makes it read its configuration anew,
SIGUSR1 makes it log what it is doing.

other commands, each with a --help of its own:
{commands}

exit status: 0 stopped as asked, 2 usage, 65 bad model data, 70 internal error, 73 state directory not writable,
77 turned away by the coordinator, 78 configuration, 130 interrupted while starting."""

# Subcommands: a module with `main(argv)`, imported when it is asked for, and a line about it.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "plan": ("helixd.commands.plan", "where layers should go on machines that a file describes, and what they serve"),
    "simulate": ("helixd.commands.simulate", "what a plan serves and how long people wait, in simulated time"),
}

FIRST_STEPS = """\
helixd: and there is no configuration file; "helixd --model demo" serves the small model in the package,
"helixd --help" tells the rest"""


@dataclass(frozen=True, slots=True)
class _Flag:
    """A flag that sets one key."""

    flag: str
    key: str
    metavar: str
    help: str
    many: bool = False


_SERVING = (
    _Flag("--model", "model.path", "PATH", 'checkpoint directory, or "demo"'),
    _Flag("--name", "node.name", "NAME", "this daemon's name in logs and /cluster"),
    _Flag("--listen", "api.listen", "HOST:PORT", "where the HTTP API listens"),
)
_CLUSTER = (
    _Flag("--role", "role", "ROLE", "coordinator or worker; left out: both in this process"),
    _Flag("--coordinator", "cluster.coordinator", "HOST:PORT", "the coordinator a worker joins"),
    _Flag("--peer-listen", "cluster.listen", "HOST:PORT", "where other daemons connect"),
    _Flag("--secret-file", "cluster.secret_file", "FILE", "secret that all daemons of the cluster share"),
)
_MACHINE = (
    _Flag(
        "--device",
        "device.devices",
        "DEVICE",
        "torch devices, such as cpu or cuda:0 cuda:1; or emulated:TYPE",
        many=True,
    ),
    _Flag("--memory", "device.memory", "SIZE", "weights and KV cache of each device, such as 8GiB"),
    _Flag("--cluster-file", "emulation.cluster_file", "FILE", "the cluster that --device emulated:TYPE is part of"),
    _Flag("--time-scale", "emulation.time_scale", "FACTOR", "how much slower than its file an emulated device is"),
    _Flag("--state-dir", "node.state_dir", "DIR", "where identity and measurements are kept"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        status: int = importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
        return status
    parser = build_parser()
    arguments = parser.parse_args(words)
    if arguments.json and not arguments.version:
        parser.error("--json goes with --version")
    if arguments.version:
        print(version_text(as_json=arguments.json))
        return Exit.OK
    if arguments.print_defaults:
        print(documented_defaults(), end="")
        return Exit.OK
    try:
        overrides = list(_overrides(arguments))
        loaded = load(overrides, os.environ, arguments.config)
    except ConfigErrors as errors:
        for problem in errors.problems:
            print(f"helixd: {problem}", file=sys.stderr)
        if not words and find_file(os.environ, None) is None:
            print(FIRST_STEPS, file=sys.stderr)
        return Exit.CONFIG
    if arguments.check_config:
        print(f"{loaded.file or 'configuration without a file'}: OK")
        return Exit.OK
    if arguments.print_config:
        print(effective(loaded), end="")
        return Exit.OK
    return _run(loaded.config, lambda: load(overrides, os.environ, arguments.config).config)


def build_parser() -> argparse.ArgumentParser:
    """The command's parser."""
    commands = "\n".join(f"  helixd {name:10} {about}" for name, (_, about) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="helixd",
        usage="helixd [--model PATH] [options]\n       helixd COMMAND ...",
        description=DESCRIPTION,
        epilog=EXAMPLES.replace("{commands}", commands),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, flags in (("what to serve", _SERVING), ("cluster", _CLUSTER), ("this machine", _MACHINE)):
        group = parser.add_argument_group(title)
        for flag in flags:
            options: dict[str, Any] = {"action": "extend", "nargs": "+"} if flag.many else {}
            group.add_argument(
                flag.flag, dest=flag.key, metavar=flag.metavar, help=f"{flag.help} [{flag.key}]", **options
            )
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", metavar="FILE", type=Path, help="read this file and no other")
    group.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="set any key, such as --set log.level=debug"
    )
    group.add_argument("--check-config", action="store_true", help="list every mistake and exit, 78 if there is one")
    group.add_argument("--print-config", action="store_true", help="print what is in force and why, and exit")
    group.add_argument("--print-defaults", action="store_true", help="print a helixd.toml with every key, and exit")
    group = parser.add_argument_group("about")
    group.add_argument("--version", action="store_true", help="print versions and exit")
    group.add_argument("--json", action="store_true", help="with --version: as JSON")
    return parser


def version_text(*, as_json: bool) -> str:
    """Versions of helixd, its peer protocol, Python and torch, without importing torch."""
    from helixd.wire.handshake import PROTOCOL_VERSION

    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    facts = {
        "helixd": helixd.__version__,
        "protocol": PROTOCOL_VERSION,
        "python": platform.python_version(),
        "torch": torch,
    }
    if as_json:
        return json.dumps(facts)
    return "helixd {helixd} (protocol {protocol}, python {python}, torch {torch})".format_map(
        facts | {"torch": torch or "not installed"}
    )


def _overrides(arguments: argparse.Namespace) -> Iterator[Override]:
    for flag in (*_SERVING, *_CLUSTER, *_MACHINE):
        value = getattr(arguments, flag.key)
        if value is not None:
            yield Override(flag.key, ",".join(value) if flag.many else value, flag.flag)
    for assignment in arguments.set:
        key, _, value = assignment.partition("=")
        yield Override(key.strip(), value.strip(), f"--set {key.strip()}")


def _run(config: Config, read: Callable[[], Config]) -> int:
    logs.setup(config.log.level, config.log.format)
    try:
        _make_state_dir(config.node.state_dir)
    except OSError as error:
        reason = error.strerror or str(error)
        logs.event(logger, logging.ERROR, "state_not_writable", path=str(config.node.state_dir), reason=reason)
        return Exit.STATE_NOT_WRITABLE
    try:
        return _load_daemon()(config, read)
    except ConfigError as error:
        logs.event(logger, logging.ERROR, "config_refused", reason=str(error))
        return Exit.CONFIG
    except ModelError as error:
        logs.event(logger, logging.ERROR, "model_refused", reason=str(error))
        return Exit.BAD_MODEL
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    except Exception:
        logs.event(logger, logging.CRITICAL, "internal_error", exc_info=True)
        return Exit.INTERNAL


def _load_daemon() -> Callable[[Config, Callable[[], Config]], int]:
    """Torch takes seconds to import: only a daemon pays for it. Ctrl-C meanwhile ends the process, without a trace."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        from helixd.daemon import run
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    return run


def _make_state_dir(path: Path) -> None:
    """Make the directory and prove that it takes a file. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
        return
