"""What happened in a run: one format, written by every client, every room and whoever kills.

Owns the format and its files. An event is one line of JSON, `[time, who, room, connection, sequence, event,
detail]`, appended to a file of its writer's, so that nothing that dies takes lines of others along:

    clients.jsonl   what clients did and what they read; buffered, since nobody kills the clients
    rooms.jsonl     each attempt of a turn, one write(2) each to a file opened with O_APPEND
    killer.jsonl    kills, restarts, reloads, upgrades
    truth           at the end, in clients.jsonl: what each room has stored, as it tells by HTTP

The time is CLOCK_MONOTONIC in seconds, which is one clock for all processes of the machine. A line of
`rooms.jsonl` is an *attempt*: a turn that ran and whose result was discarded leaves one too, and that is no
fault. What counts is what clients have read and what rooms have stored; attempts only say where an effect
came from. Peers: `clients` and `app` write, `checker` reads.
"""

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["CLIENTS", "KILLER", "ROOMS", "Event", "Log", "read", "read_lines", "write"]

CLIENTS, ROOMS, KILLER = "clients.jsonl", "rooms.jsonl", "killer.jsonl"


class Event(NamedTuple):
    """One line of a history.

    `who` is client, room, killer or truth. `sequence` numbers the messages of a connection from 1, 0 where
    there is none. What `event` and `detail` may be is written in `checker`.
    """

    time: float
    who: str
    room: str
    connection: str
    sequence: int
    event: str
    detail: Any = None

    def __str__(self) -> str:
        detail = json.dumps(self.detail, ensure_ascii=False)
        if len(detail) > 160:
            detail = detail[:157] + "..."
        where = f"{self.room}/{self.connection}" if self.connection else self.room
        return f"{self.time:.6f} {self.who} {where} #{self.sequence} {self.event} {detail}"


class Log:
    """Appends events to a file, buffered; a context manager that flushes and closes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=1 << 20)
        self.count = 0

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(
        self, who: str, room: str, connection: str, sequence: int, event: str, detail: Any = None
    ) -> float:
        """Write one event of now, and return its time."""
        now = time.monotonic()
        self.raw(now, who, room, connection, sequence, event, json.dumps(detail, separators=(",", ":")))
        return now

    def raw(
        self, now: float, who: str, room: str, connection: str, sequence: int, event: str, detail: str
    ) -> None:
        """Write one event whose detail is JSON already; the names hold nothing that JSON would escape."""
        self.count += 1
        self._file.write(
            f'[{now:.6f},"{who}","{room}","{connection}",{sequence},"{event}",{detail}]\n'.encode()
        )

    def flush(self) -> None:
        """Hand everything to the kernel."""
        self._file.flush()


def read_lines(path: Path) -> tuple[list[Event], int]:
    """Give the events of one file, and how many lines of it cannot be read.

    A line is broken where its writer was killed in the middle of write(2); the next one begins anew.
    """
    events: list[Event] = []
    broken = 0
    if not path.exists():
        return events, broken
    with path.open("rb") as file:
        for line in file:
            if line == b"\n":
                continue
            try:
                events.append(Event(*json.loads(line)))
            except (ValueError, TypeError):
                broken += 1
    return events, broken


def read(folder: Path) -> list[Event]:
    """Give all events of a run in the order of their time; those of one writer stay in its own order.

    Raises ValueError when a file that nobody is killed over is damaged.
    """
    events: list[Event] = []
    for name in (ROOMS, CLIENTS, KILLER):
        found, broken = read_lines(folder / name)
        if broken and name != ROOMS:
            raise ValueError(f"{broken} lines of {folder / name} cannot be read")
        events += found
    events.sort(key=lambda event: event.time)
    return events


def write(folder: Path, events: Iterable[Event]) -> None:
    """Write a history, for another look at it with the same tools."""
    names = {"room": ROOMS, "killer": KILLER}
    files = {}
    try:
        for event in events:
            name = names.get(event.who, CLIENTS)
            if name not in files:
                files[name] = (folder / name).open("w")
            files[name].write(json.dumps(event, separators=(",", ":")) + os.linesep)
    finally:
        for file in files.values():
            file.close()
