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
        and `turn` (hook, seconds, waits, line): the one that has been running longest, None if none is.
    """
    cell = pool.cells.get(key)
    if cell is None:
        return {"awake": False, "waiting": 0, "reasons": [], "turn": None}
    turns = [_turn(each) for each in pool._workers if each.cell is cell]
    turns.sort(key=lambda turn: -turn["seconds"])
    return {
        "awake": cell.server is not None,
        "waiting": len(cell.events),
        "reasons": _reasons(cell, turns),
        "turn": turns[0] if turns else None,
    }


def _turn(worker: Worker) -> dict[str, Any]:
    return {
        "hook": worker.hook,
        "seconds": round(monotonic() - worker.started, 3),
        "waits": bool(worker.waiting[0]),
        "line": _line(worker.running),
    }


def _reasons(cell: Cell, turns: list[dict[str, Any]]) -> list[str]:
    reasons = []
    for turn in turns:
        where = f" at {turn['line']}" if turn["line"] else ""
        reasons.append(f"{turn['hook']} has been running for {turn['seconds']:.1f} s{where}")
    if not turns and cell.events and not cell.retry_at:
        reasons.append(f"{len(cell.events)} events wait for their turn")
    for work in cell.background:
        line = _line(work.running)
        where = f" at {line}" if line else ""
        reasons.append(
            f"background work {work.name} has been running for {monotonic() - work.started_at:.1f} s{where}"
        )
    answers = cell.streams - len(cell.background)
    if answers:
        reasons.append(f"{answers} answers are being streamed")
    if cell.server is not None and not turns and not cell.streams:
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
    if cell.failures and cell.server is None and not turns:
        reasons.append(f"it has failed to start {cell.failures} times")
    return reasons


def _line(running: Any) -> str:
    """The line of the app's own code at which a coroutine waits: "path:line", or ""."""
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
