"""Received frames of one class on their way to the handler: one at a time, in order, bounded by credits."""

import asyncio
import types
from asyncio.tasks import _enter_task, _leave_task
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

from helixd.wire.credits import CreditReturn
from helixd.wire.link import Frame, FrameHandler, Link


class Inbox:
    """A queue and its only consumer, the task in `run`.

    `give_back` is called with credits worth a message, `failed` with a frame whose handler raised.

    A frame that finds the consumer idle is handled at once, in the consumer's name: the handler starts in the loop's
    callback that brought the frame, and if it has to wait, the consumer goes on with it. Most handlers never wait, and
    waking a task for each of them would cost a third of a small frame's round trip. `asyncio.current_task()` is the
    consumer throughout, so timeouts and task groups in handlers work as ever.
    """

    __slots__ = (
        "_begun", "_busy", "_failed", "_give_back", "_handler", "_idle", "_link", "_loop", "_queue", "_stopped",
        "_task", "_waiter", "credits",
    )  # fmt: skip

    def __init__(
        self,
        link: Link,
        credits: CreditReturn,
        give_back: Callable[[int], None],
        failed: Callable[[Frame, BaseException], None],
    ) -> None:
        self.credits = credits
        self._link = link
        self._failed = failed
        self._give_back = give_back
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[Frame, int]] = deque()
        self._handler: FrameHandler | None = None
        self._task: asyncio.Task[Any] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._begun: tuple[Awaitable[None], Frame, int] | None = None
        self._busy = False
        self._stopped = False
        # The consumer waits and nothing is queued: the next frame may be handled at once.
        self._idle = False

    @property
    def empty(self) -> bool:
        """Whether nothing waits and nothing is being handled."""
        return not self._queue and not self._busy

    def put(self, frame: Frame, charge: int) -> None:
        """Take in a frame whose `charge` the credits have taken note of. Only from the loop, never from a task."""
        handler, task = self._handler, self._task
        if not self._idle or handler is None or task is None:
            self._queue.append((frame, charge))
            self._wake()
            return
        self._idle, self._busy = False, True
        _enter_task(self._loop, task)
        try:
            handling = handler(self._link, frame)
            awaited = handling.send(None)
        except StopIteration:
            self._busy = False
        except (Exception, asyncio.CancelledError) as error:
            self._busy = False
            self._failed(frame, error)
        else:
            self._begun = (_go_on(handling, awaited), frame, charge)
            self._wake()
            return
        finally:
            _leave_task(self._loop, task)
        if not self._stopped:
            self._idle = not self._queue
            credit = self.credits.handled(charge)
            if credit:
                self._give_back(credit)

    def done(self, charge: int) -> None:
        """Something of `charge` is finished with."""
        credit = self.credits.handled(charge)
        if credit:
            self._give_back(credit)

    async def run(self, handler: FrameHandler, drained: Callable[[], None]) -> None:
        """Hand every frame to `handler`; tell `drained` whenever none is left. Ends by cancellation or `stop`."""
        self._handler, self._task = handler, asyncio.current_task()
        while not self._stopped or self._begun is not None:
            if self._begun is not None:
                (handling, frame, charge), self._begun = self._begun, None
            elif self._queue:
                frame, charge = self._queue.popleft()
                handling = handler(self._link, frame)
            else:
                drained()
                if not self._stopped:
                    self._waiter = self._loop.create_future()
                    self._idle = True
                    await self._waiter
                    self._idle = False
                continue
            await self._finish(handling, frame)
            if not self._stopped:
                self.done(charge)

    async def _finish(self, handling: Awaitable[None], frame: Frame) -> None:
        self._busy = True
        try:
            await handling
        except asyncio.CancelledError as error:
            if self._task is None or self._task.cancelling():
                raise
            self._failed(frame, error)
        except Exception as error:
            self._failed(frame, error)
        finally:
            self._busy = False

    def stop(self) -> None:
        """Deliver nothing more. A handler that is running may end in peace."""
        self._stopped = True
        self._idle = False
        self._queue.clear()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@types.coroutine
def _go_on(handling: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """The rest of a handler whose first step, done elsewhere, led to waiting for `awaited`."""
    step: Callable[[Any], Any]
    while True:
        try:
            value = yield awaited
        except GeneratorExit:
            handling.close()
            raise
        except BaseException as error:
            step, value = handling.throw, error
        else:
            step = handling.send
        try:
            awaited = step(value)
        except StopIteration:
            return
