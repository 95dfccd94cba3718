"""Coroutines that are started in the present task and carried on when they have to wait."""

import sys
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from hibernation.suspension import carry_on, watched


def run(function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return trio.run(function, clock=MockClock(autojump_threshold=0))


async def at_once(value: Any) -> Any:
    return value


async def later(value: Any, seconds: float = 1) -> Any:
    await trio.sleep(seconds)
    await trio.sleep(seconds)
    return value


def test_what_never_waits_is_not_reported():
    """A turn that never really waits costs no task switch."""

    async def main() -> None:
        calls: list[int] = []
        assert await watched(at_once(5), lambda: calls.append(1), [0]) == 5
        with pytest.raises(ZeroDivisionError):
            await watched(fails(), lambda: calls.append(1), [0])
        assert calls == []

    async def fails() -> None:
        raise ZeroDivisionError

    run(main)


def test_what_waits_is_reported_once_and_before_others_run():
    """However often it waits."""

    async def main() -> None:
        calls: list[str] = []

        async def other() -> None:
            calls.append("other")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            assert await watched(later("done"), lambda: calls.append("suspended"), [0]) == "done"
        assert calls == ["suspended", "other"]

    run(main)


def test_errors_pass_through_in_both_directions():
    """What the event loop throws reaches the coroutine, what that raises reaches the caller."""

    async def main() -> None:
        async def catches() -> str:
            with trio.move_on_after(1):
                await trio.sleep_forever()
            with pytest.raises(trio.TooSlowError):
                with trio.fail_after(1):
                    await trio.sleep_forever()
            try:
                await trio.sleep(1)
                raise KeyError("own")
            except KeyError:
                await trio.sleep(1)
            raise LookupError("last")

        with pytest.raises(LookupError, match="last"):
            await watched(catches(), lambda: None, [0])

    run(main)


def test_cancellation_from_outside_reaches_the_coroutine_and_its_clean_up():
    """Cancel scopes around it work as around a plain await."""
    seen: list[str] = []

    async def main() -> None:
        async def cleans_up() -> None:
            try:
                await trio.sleep_forever()
            finally:
                with trio.CancelScope(shield=True):
                    await trio.sleep(1)
                seen.append("clean")

        start = trio.current_time()
        with trio.move_on_after(1) as scope:
            await watched(cleans_up(), lambda: None, [0])
        assert scope.cancelled_caught
        assert trio.current_time() == pytest.approx(start + 2)

    run(main)
    assert seen == ["clean"]


def test_nurseries_and_their_children_work_inside():
    """The coroutine runs in the task that awaits it."""

    async def main() -> None:
        task = trio.lowlevel.current_task()
        done: list[int] = []

        async def child(number: int) -> None:
            await trio.sleep(number)
            done.append(number)

        async def parent() -> None:
            assert trio.lowlevel.current_task() is task
            async with trio.open_nursery() as nursery:
                for number in (3, 1, 2):
                    nursery.start_soon(child, number)
            assert trio.lowlevel.current_task() is task
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, 100)
                await trio.sleep(1)
                nursery.cancel_scope.cancel()

        await watched(parent(), lambda: None, [0])
        assert done == [1, 2, 3]

    run(main)


def test_a_coroutine_that_is_thrown_away_is_closed():
    """Its `finally` runs, and nothing warns."""
    seen: list[str] = []
    running = waits_by_hand(seen)
    carried = carry_on(running, running.send(None), [0])
    assert carried.send(None) == "trap"
    carried.close()
    assert seen == ["closed"]


def waits_by_hand(seen: list[str]) -> Coroutine[Any, Any, None]:
    class Trap:
        def __await__(self) -> Any:
            yield "trap"

    async def waits() -> None:
        try:
            await Trap()
        finally:
            seen.append("closed")

    return waits()


def test_what_the_loop_sends_reaches_the_coroutine():
    """Traps and their values go through unchanged."""

    class Trap:
        def __await__(self) -> Any:
            got = yield "first"
            more = yield got + 1
            return more

    async def asks() -> Any:
        return await Trap()

    running = asks()
    carried = carry_on(running, running.send(None), [0])
    assert carried.send(None) == "first"
    assert carried.send(41) == 42
    with pytest.raises(StopIteration) as stop:
        carried.send("end")
    assert stop.value.value == "end"


def test_a_long_chain_of_waits_needs_no_stack():
    """A handler may wait as often as it likes."""

    async def main() -> None:
        async def waits_often() -> int:
            for _ in range(5 * sys.getrecursionlimit()):
                await trio.lowlevel.checkpoint()
            return 1

        assert await watched(waits_often(), lambda: None, [0]) == 1

    run(main)
