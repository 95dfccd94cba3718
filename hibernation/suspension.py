"""Runs a coroutine in the present task and tells when it first has to wait.

Owns nothing. It exists so that a pool of workers can run thousands of turns in one task as long as none of
them really waits, and hand the pool's work on at the moment when one does: creating or switching a task per
turn would cost more than the turn.
"""

from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any


@coroutine
def carry_on(
    running: Coroutine[Any, Any, Any], trap: Any, waiting: list[int] | memoryview
) -> Generator[Any, Any, Any]:
    """Go on with a coroutine that has been started by `send(None)` and has yielded `trap`.

    `waiting[0]` is 1 while it waits, and 0 while it runs.

    Traps go to the event loop unchanged, in the same task, so that cancellation, timeouts and nurseries work
    as in a plain `await`. Returns what the coroutine returns; its exceptions pass through.
    """
    while True:
        waiting[0] = 1
        try:
            sent = yield trap
        except GeneratorExit:
            waiting[0] = 0
            running.close()
            raise
        except BaseException as error:  # noqa: BLE001 - passed on to where it belongs
            waiting[0] = 0
            try:
                trap = running.throw(error)
            except StopIteration as stop:
                return stop.value
        else:
            waiting[0] = 0
            try:
                trap = running.send(sent)
            except StopIteration as stop:
                return stop.value


async def watched(
    running: Coroutine[Any, Any, Any], suspended: Callable[[], None], waiting: list[int] | memoryview
) -> Any:
    """Await `running`; call `suspended()` once, just before it yields to the event loop for the first time.

    Args:
        running: A coroutine that has not started.
        suspended: Must not raise or wait.
        waiting: See `carry_on`.
    """
    try:
        trap = running.send(None)
    except StopIteration as stop:
        return stop.value
    suspended()
    return await carry_on(running, trap, waiting)
