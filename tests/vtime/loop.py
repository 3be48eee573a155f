"""An event loop without a clock of its own: when nothing is ready, time jumps to the next timer.

What runs belongs to a `Process`, which can be stopped (its callbacks and timers wait, as after SIGSTOP), continued, or
be dead (they are dropped). Threads are virtual too: `run_in_executor` runs the call on the loop, at a later time, one
after another per executor, and `spend` says how long a call takes. The same seed gives the same history.
"""

import asyncio
import contextvars
import heapq
import itertools
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

SPIN_LIMIT = 50_000
CANCELLED_TIMERS = 200
CALL_STARTS_WITHIN_S = 0.002
ENDING_S = 60.0

_process: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)


class Stuck(AssertionError):
    """Nothing is ready and no timer is set: whoever waits, waits for ever."""


class Spinning(AssertionError):
    """Callbacks follow each other without end while no time passes."""


class Task(asyncio.Task):  # type: ignore[type-arg]
    """A task that hashes by its number, so that sets of tasks (in every TaskGroup) have the same order every time."""

    _numbers = itertools.count()

    def __init__(self, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self._number = next(Task._numbers)
        context = options.get("context")
        self.process = _process.get() if context is None else context.get(_process)
        super().__init__(coro, **options)
        if self.process is not None:
            self.process.tasks.add(self)
            self.add_done_callback(self.process.tasks.discard, context=self.process.context())

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class Process:
    """Everything that was started in its name."""

    def __init__(self, loop: "VirtualLoop", name: str) -> None:
        self.loop = loop
        self.name = name
        self.stopped = False
        self.dead = False
        self.tasks: set[Task] = set()
        self.parked: deque[asyncio.Handle] = deque()

    def context(self) -> contextvars.Context:
        """A context in which whatever is called or started belongs to this process."""
        context = contextvars.copy_context()
        context.run(_process.set, self)
        return context

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Start a task of this process."""
        return self.context().run(lambda: self.loop.create_task(work, name=name))

    def stop(self) -> None:
        """Nothing of it runs until `cont`."""
        self.stopped = True

    def cont(self) -> None:
        """It goes on where it was; its timers that went by in the meantime have fired."""
        self.stopped = False
        self.loop.resume(self.parked)


class _Thread:
    """What waits for one executor."""

    def __init__(self) -> None:
        self.calls: deque[tuple[asyncio.Future[Any], Callable[[], Any], contextvars.Context]] = deque()
        self.busy = False


class VirtualLoop(asyncio.BaseEventLoop):
    """Use `running`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.iterations = 0
        self.failures: list[str] = []
        self._now_s = 1000.0
        self._clock_resolution = 1e-9
        self._without_time = 0
        self._ending = False
        self._threads: dict[int, _Thread] = {}
        self._spent_s = 0.0
        self.set_task_factory(lambda loop, coro, **options: Task(coro, loop=loop, **options))
        self.set_exception_handler(self._failed)

    # -- time --------------------------------------------------------------------------------------------------------

    def time(self) -> float:
        return self._now_s

    def resume(self, handles: deque[asyncio.Handle]) -> None:
        """Run these next, in order."""
        self._ready.extend(handles)  # type: ignore[attr-defined]
        handles.clear()

    def advance(self, seconds: float) -> None:
        """Let that much time pass."""
        self.run_until_complete(asyncio.sleep(seconds))

    def do(self, call: Callable[[], Any]) -> Any:
        """What the call gives, made from within the loop."""

        async def once() -> Any:
            return call()

        return self.run_until_complete(once())

    def _run_once(self) -> None:
        ready, scheduled = self._ready, self._scheduled  # type: ignore[attr-defined]
        self._drop_cancelled_timers()
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not scheduled:
                raise Stuck("nothing is ready and no timer is set")
            if scheduled[0]._when > self._now_s:
                self._now_s = scheduled[0]._when
                self._without_time = 0
        while scheduled and scheduled[0]._when <= self._now_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        self.iterations += 1
        self._without_time += 1
        if self._without_time > SPIN_LIMIT:
            raise Spinning(f"no time has passed in {SPIN_LIMIT} rounds; next is {ready[0] if ready else None}")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(_process)
            if process is None or self._ending or not (process.stopped or process.dead):
                handle._run()
            elif not process.dead:
                process.parked.append(handle)
        handle = None

    def _drop_cancelled_timers(self) -> None:
        scheduled = self._scheduled  # type: ignore[attr-defined]
        cancelled = self._timer_cancelled_count
        if cancelled > CANCELLED_TIMERS and cancelled > len(scheduled) / 2:
            live = [handle for handle in scheduled if not handle._cancelled]
            for handle in scheduled:
                handle._scheduled = not handle._cancelled
            heapq.heapify(live)
            scheduled[:] = live
            self._timer_cancelled_count = 0
        while scheduled and scheduled[0]._cancelled:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            self._timer_cancelled_count -= 1

    # -- threads -----------------------------------------------------------------------------------------------------

    def spend(self, seconds: float) -> None:
        """Said by a call that runs in a virtual thread: it takes that long."""
        self._spent_s += seconds

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        if executor is not None and executor._shutdown:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future: asyncio.Future[Any] = self.create_future()
        thread = self._threads.setdefault(id(executor), _Thread())
        thread.calls.append((future, lambda: func(*args), contextvars.copy_context()))
        if not thread.busy:
            thread.busy = True
            self._start(thread)
        return future

    def _start(self, thread: _Thread) -> None:
        _, _, context = thread.calls[0]
        self.call_later(self.random.uniform(0, CALL_STARTS_WITHIN_S), self._call, thread, context=context)

    def _call(self, thread: _Thread) -> None:
        future, call, context = thread.calls[0]
        self._spent_s, result, error = 0.0, None, None
        # As in a thread, a call goes on although nobody waits for it any more; one that has not begun does not begin.
        if not future.cancelled():
            try:
                result = call()
            except Exception as raised:
                error = raised
        self.call_later(self._spent_s, self._return, thread, result, error, context=context)

    def _return(self, thread: _Thread, result: Any, error: Exception | None) -> None:
        future, _, _ = thread.calls.popleft()
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)
        thread.busy = bool(thread.calls)
        if thread.busy:
            self._start(thread)

    # -- the end -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End what still waits, that of dead processes too, while there is a loop to do it."""
        self._ending, self._without_time = True, 0
        if tasks := asyncio.all_tasks(self):
            for task in tasks:
                if isinstance(task, Task) and task.process is not None:
                    self.resume(task.process.parked)
                task.cancel()
            self.run_until_complete(asyncio.wait(tasks, timeout=ENDING_S))
        self.run_until_complete(self.shutdown_asyncgens())
        super().close()

    # -- the rest of a loop ------------------------------------------------------------------------------------------

    def _failed(self, _: asyncio.AbstractEventLoop, what: dict[str, Any]) -> None:
        self.failures.append(f"{what.get('message')}: {what.get('exception')!r} in {what.get('task') or what}")

    def _process_events(self, event_list: Any) -> None: ...

    def _write_to_self(self) -> None: ...


@contextmanager
def running(seed: int) -> Iterator[VirtualLoop]:
    """A loop, and `time.monotonic` as its clock."""
    real = time.monotonic
    loop = VirtualLoop(seed)
    time.monotonic = loop.time
    try:
        yield loop
    finally:
        try:
            loop.close()
        finally:
            time.monotonic = real
