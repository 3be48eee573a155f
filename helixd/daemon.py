"""The daemon's life: from a configuration to an exit status.

Starts the parts (`helixd.assembly`) in one TaskGroup, tells the service manager how it goes, reads the configuration
anew on SIGHUP, drains on SIGTERM or SIGINT (a second one ends at once), gives up when a device hangs, and says with its
exit status why it ended.
"""

import asyncio
import faulthandler
import importlib
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from helixd import logs
from helixd.assembly import Daemon, emulated_devices
from helixd.config import Config, ConfigErrors
from helixd.errors import ConfigError, DeviceFailed, HelixError, JoinRefused, ModelError
from helixd.exits import Exit
from helixd.service.notify import Notifier, watchdog_interval_s
from helixd.service.pulse import Pulse
from helixd.state import StateDir, StateError
from helixd.wire.errors import AuthRejected, PeerRefused, VersionMismatch
from helixd.wire.tuning import install_uvloop, tune_malloc

log = logging.getLogger(__name__)

LAST_WORDS_S = 1.0
GIVE_UP_S = 5.0
"""How long a worker whose device hangs waits for its sequences to be moved elsewhere."""
STOP_MARGIN_S = 30.0
"""What stopping takes beside draining, as far as the service manager is told."""
STOOD_STILL_S = 1.0
"""An event loop that comes round so much too late did not run: the process was stopped, or something blocked it."""

ReadConfig = Callable[[], Config]
"""Reads the configuration anew, with the same flags. Raises ConfigErrors."""


class Stopped(Exception):
    """Ends the daemon's TaskGroup; never leaves this module."""


class DeviceHangs(Exception):
    """Ends the daemon's TaskGroup, since the device's thread cannot be stopped; never leaves this module."""


def run(config: Config, read: ReadConfig) -> int:
    """Run until stopped; the exit status. `read`: for SIGHUP. Raises ConfigError and ModelError for what cannot start.

    Does not return when a device hangs: its thread would be waited for.
    """
    leave_no_core()
    tune_malloc()
    install_uvloop()
    if config.computes and not emulated_devices(config):
        _import_torch()
    try:
        state = StateDir.open(config.node.state_dir, config.node.id)
    except StateError as error:
        logs.event(log, logging.ERROR, "state_not_usable", reason=str(error))
        return Exit.STATE_NOT_WRITABLE
    notifier = Notifier.from_environment(os.environ)
    try:
        return asyncio.run(_main(config, read, state, notifier))
    except DeviceHangs:
        state.close()
        logging.shutdown()
        sys.stderr.flush()
        os._exit(Exit.INTERNAL)
    finally:
        notifier.close()
        state.close()


def leave_no_core() -> None:
    """What ends this process leaves stacks of functions in the log, never memory on the disk: prompts are in there."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):  # where stderr is nothing that has a descriptor
        faulthandler.enable()


def _import_torch() -> None:
    """Before the event loop runs, since it takes seconds. Ctrl-C meanwhile ends the process, without a trace."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        importlib.import_module("helixd.worker.torch_backend")
    finally:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)


async def _main(config: Config, read: ReadConfig, state: StateDir, notifier: Notifier) -> int:
    status = Exit.INTERNAL
    hangs = False
    try:
        async with AsyncExitStack() as stack:
            tasks = await stack.enter_async_context(asyncio.TaskGroup())
            daemon = await Daemon.start(config, state, tasks, stack)
            with _signals() as signals:
                notifier.ready(daemon.status)
                hung = tasks.create_task(_watch(daemon, notifier), name="watch")
                reloads = tasks.create_task(_reload_when_asked(daemon, read, signals.reload, notifier), name="reload")
                tells = tasks.create_task(_tell_when_asked(daemon, signals.tell), name="tell")
                stop = tasks.create_task(signals.stop.wait(), name="stop")
                await asyncio.wait({stop, hung}, return_when=asyncio.FIRST_COMPLETED)
                reloads.cancel()
                tells.cancel()
                if hung.done():
                    notifier.stopping("a device hangs", GIVE_UP_S + STOP_MARGIN_S)
                    await daemon.give_up(hung.result(), GIVE_UP_S)
                    raise DeviceHangs
                await _drain(daemon, signals.stop, notifier, tasks)
                if hung.done():
                    raise DeviceHangs
            raise Stopped
    except* Stopped:
        logs.event(log, logging.INFO, "stopped")
        status = Exit.OK
    except* DeviceHangs:
        hangs = True
    except* (JoinRefused, AuthRejected, VersionMismatch, PeerRefused) as errors:
        logs.event(log, logging.ERROR, "rejected", reason=str(_first(errors)))
        status = Exit.REJECTED
    except* DeviceFailed as errors:
        logs.event(log, logging.ERROR, "device_failed", reason=str(_first(errors)))
    except* (ConfigError, ModelError) as errors:
        raise _first(errors) from None
    if hangs:
        raise DeviceHangs
    return status


async def _drain(daemon: Daemon, stop: asyncio.Event, notifier: Notifier, tasks: asyncio.TaskGroup) -> None:
    stop.clear()
    limit_s = daemon.config.cluster.timers.drain_s
    logs.event(log, logging.INFO, "draining", limit_s=limit_s)
    drain = tasks.create_task(daemon.drain(), name="drain")
    notifier.stopping(f"draining; {daemon.status}", limit_s + STOP_MARGIN_S)
    again = tasks.create_task(stop.wait(), name="second signal")
    await asyncio.wait({drain, again}, return_when=asyncio.FIRST_COMPLETED)
    if not drain.done():
        logs.event(log, logging.WARNING, "stopped_before_drained")
        daemon.end_requests()
        await asyncio.wait({drain}, timeout=LAST_WORDS_S)


async def _watch(daemon: Daemon, notifier: Notifier) -> str:
    """Tell the service manager how it goes, and that all is alive while it is; returns once a device hangs."""
    pulse = Pulse(watchdog_interval_s(os.environ))
    while True:
        before_s = time.monotonic()
        await asyncio.sleep(pulse.tick_s)
        now_s = time.monotonic()
        lag_s = max(0.0, now_s - before_s - pulse.tick_s)
        daemon.note_loop_lag(lag_s)
        overdue = daemon.overdue(lag_s if lag_s >= STOOD_STILL_S else 0.0)
        if pulse.beat(now_s, lag_s, overdue is not None):
            notifier.alive()
        notifier.status(daemon.status)
        if overdue is not None:
            node, age_s = overdue
            logs.event(log, logging.ERROR, "device_hangs", node=node, step_age_s=round(age_s, 1))
            return f"the device of {node} hangs"


async def _reload_when_asked(daemon: Daemon, read: ReadConfig, asked: asyncio.Event, notifier: Notifier) -> None:
    while True:
        await asked.wait()
        asked.clear()
        notifier.reloading()
        try:
            change = await daemon.reload(await asyncio.to_thread(read), os.environ)
        except ConfigError as error:
            # The old configuration stays in force, all of it.
            for problem in error.problems if isinstance(error, ConfigErrors) else (error,):
                logs.event(log, logging.ERROR, "reload_refused", reason=str(problem))
        else:
            logs.event(log, logging.INFO, "reloaded", applied=list(change.applied))
            if change.waiting:
                logs.event(log, logging.WARNING, "restart_needed", keys=list(change.waiting))
        notifier.ready(daemon.status)


async def _tell_when_asked(daemon: Daemon, asked: asyncio.Event) -> None:
    while True:
        await asked.wait()
        asked.clear()
        logs.event(log, logging.INFO, "snapshot", **daemon.snapshot())


@dataclass(frozen=True, slots=True)
class _Signals:
    """`stop`: SIGTERM, SIGINT, or the end of the terminal the daemon writes to. `reload`: SIGHUP otherwise.

    `tell`: SIGUSR1.
    """

    stop: asyncio.Event = field(default_factory=asyncio.Event)
    reload: asyncio.Event = field(default_factory=asyncio.Event)
    tell: asyncio.Event = field(default_factory=asyncio.Event)


@contextmanager
def _signals() -> Iterator[_Signals]:
    loop, signals = asyncio.get_running_loop(), _Signals()
    on_terminal = sys.stderr.isatty()

    def hang_up() -> None:
        # A terminal that is gone is none any more.
        gone = on_terminal and not os.isatty(sys.stderr.fileno())
        (signals.stop if gone else signals.reload).set()

    handlers = {signal.SIGTERM: signals.stop.set, signal.SIGINT: signals.stop.set, signal.SIGHUP: hang_up}
    handlers[signal.SIGUSR1] = signals.tell.set
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    try:
        yield signals
    finally:
        for number in handlers:
            loop.remove_signal_handler(number)


def _first(errors: BaseExceptionGroup[HelixError]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
