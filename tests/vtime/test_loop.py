import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.vtime.loop import Process, Spinning, Stuck, running


def test_hours_take_no_time_and_everybody_sees_the_same_clock():
    real = time.monotonic()
    with running(1) as loop:
        began = time.monotonic()

        async def sleeper():
            await asyncio.sleep(3600)
            return time.monotonic() - began, loop.time() - began

        assert loop.run_until_complete(sleeper()) == (3600.0, 3600.0)
    assert abs(time.monotonic() - real) < 60


def test_timers_fire_in_the_order_of_their_times():
    with running(1) as loop:
        seen = []

        async def note(after_s):
            await asyncio.sleep(after_s)
            seen.append(after_s)

        async def all_of_them():
            await asyncio.gather(*(note(s) for s in (5.0, 0.0, 0.3, 2.0, 0.3001)))

        loop.run_until_complete(all_of_them())
        assert seen == [0.0, 0.3, 0.3001, 2.0, 5.0]


def test_timeouts_that_are_not_needed_leave_nothing_behind():
    with running(1) as loop:

        async def many():
            for _ in range(2000):
                async with asyncio.timeout(1e6):
                    await asyncio.sleep(0.001)

        loop.run_until_complete(many())
        assert len(loop._scheduled) < 500


def test_waiting_for_what_nobody_will_do_is_noticed():
    with running(1) as loop, pytest.raises(Stuck):
        loop.run_until_complete(asyncio.Event().wait())


def test_spinning_is_noticed():
    with running(1) as loop:

        async def spin():
            while True:
                await asyncio.sleep(0)

        with pytest.raises(Spinning):
            loop.run_until_complete(spin())


def test_a_stopped_process_goes_on_where_it_was_with_its_timers_past():
    with running(1) as loop:
        process, ticks = Process(loop, "p"), []

        async def tick():
            while True:
                await asyncio.sleep(1.0)
                ticks.append(loop.time() - 1000)

        process.spawn(tick(), "tick")
        loop.advance(2.5)
        process.stop()
        loop.advance(10)
        assert ticks == [1.0, 2.0]
        process.cont()
        loop.advance(1.6)
        assert ticks == [1.0, 2.0, 12.5, 13.5]
        process.dead = True
        loop.advance(5)
        assert len(ticks) == 4


def test_what_a_process_starts_is_its_own():
    with running(1) as loop:
        process, done = Process(loop, "p"), []

        async def child():
            await asyncio.sleep(1)
            done.append(True)

        async def parent():
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(child())

        process.spawn(parent(), "parent")
        loop.advance(0.5)
        assert len(process.tasks) == 2
        process.stop()
        loop.advance(5)
        assert not done
        process.cont()
        loop.advance(0.1)
        assert done
        assert not process.tasks


def test_calls_of_one_thread_follow_each_other_and_take_their_time():
    with running(1) as loop:
        executor, seen = ThreadPoolExecutor(1), []

        def call(name, seconds):
            seen.append((name, loop.time()))
            loop.spend(seconds)
            return name

        async def both():
            first = loop.run_in_executor(executor, call, "a", 3.0)
            second = loop.run_in_executor(executor, call, "b", 1.0)
            return await second, await first

        began = loop.time()
        assert loop.run_until_complete(both()) == ("b", "a")
        assert 4.0 <= loop.time() - began < 4.1
        assert [name for name, _ in seen] == ["a", "b"]
        executor.shutdown()
        with pytest.raises(RuntimeError, match="after shutdown"):
            loop.run_in_executor(executor, call, "c", 1.0)


def test_a_call_outlives_whoever_waited_for_it_and_its_error_is_the_waiters():
    with running(1) as loop:
        executor, ran = ThreadPoolExecutor(1), []

        def call():
            loop.spend(2.0)
            ran.append(True)
            raise ValueError("no")

        async def impatient():
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await loop.run_in_executor(executor, call)
            with pytest.raises(ValueError, match="no"):
                await loop.run_in_executor(executor, call)

        loop.run_until_complete(impatient())
        assert len(ran) == 2


def test_the_same_seed_gives_the_same_history():
    def history(seed):
        with running(seed) as loop:
            executor, seen = ThreadPoolExecutor(1), []

            async def work():
                for _ in range(5):
                    await loop.run_in_executor(executor, lambda: None)
                    seen.append(loop.time())

            loop.run_until_complete(work())
            return seen

    assert history(7) == history(7) != history(8)
