"""Why a room is awake, as `broker explain` tells it (S7).

Owns the look at one cell of the pool. Changes nothing and wakes nothing.
"""

from types import CodeType, CoroutineType, FrameType
from typing import Any

from hibernation.cells import Cell, Worker
from hibernation.pool import Pool
from storage.clock import monotonic

__all__ = ["explain"]


def explain(pool: Pool, key: str) -> dict[str, Any]:
    """What is known of the room with this key ("party/id").

    Returns:
        `awake`, `waiting` (events that have not begun), `reasons` (texts: what keeps the object in memory)
        and `turn` (hook, seconds, waits, line), None if no turn is under way.
    """
    cell = pool.cells.get(key)
    if cell is None:
        return {"awake": False, "waiting": 0, "reasons": [], "turn": None}
    worker = next((each for each in pool._workers if each.cell is cell), None)
    turn = None if worker is None else _turn(worker)
    return {
        "awake": cell.server is not None,
        "waiting": len(cell.events),
        "reasons": _reasons(cell, turn),
        "turn": turn,
    }


def _turn(worker: Worker) -> dict[str, Any]:
    return {
        "hook": worker.hook,
        "seconds": round(monotonic() - worker.started, 3),
        "waits": bool(worker.waiting[0]),
        "line": _line(worker.running, worker),
    }


def _reasons(cell: Cell, turn: dict[str, Any] | None) -> list[str]:
    reasons = []
    if turn is not None:
        where = f" at {turn['line']}" if turn["line"] else ""
        reasons.append(f"{turn['hook']} has been running for {turn['seconds']:.1f} s{where}")
    elif cell.events and not cell.retry_at:
        reasons.append(f"{len(cell.events)} events wait for their turn")
    if cell.streams:
        reasons.append(f"{cell.streams} answers are being streamed")
    if cell.server is not None and turn is None and not cell.streams:
        idle_seconds = monotonic() - cell.used_at
        if cell.kind.hibernate:
            reasons.append(
                f"idle for {idle_seconds:.1f} s of the {cell.kind.idle_seconds:g} s of idle_seconds"
            )
        elif cell.deserted_at:
            reasons.append(
                f"hibernate is False: its last connection left {monotonic() - cell.deserted_at:.1f} s ago,"
                f" and idle_seconds is {cell.kind.idle_seconds:g}"
            )
        else:
            reasons.append("hibernate is False: it stays while it has a connection")
    if cell.failures and cell.server is None and turn is None:
        reasons.append(f"it has failed to start {cell.failures} times")
    return reasons


def _line(running: Any, worker: Worker) -> str:
    """The line of the app's own code at which a hook waits: "path:line", or ""."""
    assert worker.cell is not None
    found = ""
    hook_file = _file_of(running)
    for frame in _frames(running):
        if frame.f_code.co_filename == hook_file:
            found = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return found


def _file_of(running: Any) -> str:
    code = getattr(running, "cr_code", None)
    return code.co_filename if isinstance(code, CodeType) else ""


def _frames(running: Any) -> list[FrameType]:
    """The frames of a chain of coroutines that wait for each other, outermost first."""
    frames = []
    while running is not None:
        frame = getattr(running, "cr_frame", None) or getattr(running, "gi_frame", None)
        if isinstance(frame, FrameType):
            frames.append(frame)
        running = (
            running.cr_await if isinstance(running, CoroutineType) else getattr(running, "gi_yieldfrom", None)
        )
    return frames
