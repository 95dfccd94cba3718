"""The note of turns in progress: what a host was doing when it died, for the host that comes after it.

Owns one small file per host, mapped into memory, `<data>/running/<index>`. The host writes into it what
runs, a few words at the beginning of a turn and one at its end, without a system call; so the note is there
however the host ends. Decides nothing: what follows from a note is `hibernation.suspects`. Peers:
`hibernation.pool`, `turns` and `exchanges`, which note; `hibernation.blame`, which reads its predecessor's.

The file is a header of eight 64-bit words and then slots of four. A slot belongs to one task:

    who      number of the connection; or STARTING, ASKING, REPLAYING, ALARMING, OTHER; 0: nothing runs in
             this slot
    what     end of the message, CONNECTING, CLOSING; the room's fingerprint; the number of the question or
             of the alarm
    waiting  1 while the turn waits for something, 0 while its code is on the processor
    -

`who` is written last at the beginning, so a slot whose writer was killed between two words says nothing, or
names an event that does not exist.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import adler32, crc32

from hibernation import wire
from storage.errors import DataDirectoryError

__all__ = [
    "ALARM",
    "ALARMING",
    "ASKING",
    "FAILED",
    "OTHER",
    "REPLAY",
    "REPLAYING",
    "STARTING",
    "Left",
    "Mark",
    "Running",
    "mark_of",
    "mark_of_start",
    "read_left",
    "running_path",
]

#: Names an event, or the start of a room, in two words: who and what.
Mark = tuple[int, int]

#: Who, where it is no connection: a room that is being started, a before-hook of an upgrade, an
#: alarm, anything else.
STARTING: Final = -1
ASKING: Final = -2
OTHER: Final = -3
REPLAYING: Final = -4
ALARMING: Final = -5
#: What, for the events of a connection that have no end in its stream.
CONNECTING: Final = -1
CLOSING: Final = -2

#: Events of the host's own, behind those of the link. REPLAY: key, dead letter, who is told of its end.
#: ALARM: key, name, number of an alarm that is due; in a dead letter also scheduled_ms, attempt and payload.
REPLAY: Final = 100
ALARM: Final = 101
#: Another: key, what background work of the room has raised.
FAILED: Final = 110

MAGIC: Final = 0x62726B_72756E_01
"""Says that this is such a file, and of which version."""

WORD: Final = 8
HEADER_WORDS: Final = 8
SLOT_WORDS: Final = 4
SLOTS_PER_BLOCK: Final = 2046
"""A block is 64 KiB less a header: what is mapped and reserved on disk at once."""

BLOCK_BYTES: Final = (HEADER_WORDS + SLOTS_PER_BLOCK * SLOT_WORDS) * WORD

# Words of the header.
_MAGIC, _BOOT_HIGH, _BOOT_LOW, _PID, _ENDED, _BLOCKED, _CODE = range(7)

#: Values of the header's word for the end: the turns in the slots have not ended this host.
IN_PROGRESS: Final = 0
ENDED_WELL: Final = 1
NO_TURNS_FAULT: Final = 2


@dataclass(frozen=True, slots=True)
class Left:
    """What a host has left behind.

    Attributes:
        marks: What was in progress, each with whether it waited.
        clean: It ended because it was told to.
        blocked: Its loop was blocked when it ended.
        code: Which code it ran.
    """

    marks: tuple[tuple[Mark, bool], ...] = ()
    clean: bool = False
    blocked: bool = False
    code: int = 0


def running_path(data: Path, index: int) -> Path:
    """Where the note of the host with this index lies."""
    return data / "running" / str(index)


def mark_of(event: list[object]) -> Mark | None:
    """The mark of an event, if a host that comes next is given it again; else None."""
    kind = event[0]
    if kind == wire.MESSAGE:
        return event[3], event[6]  # type: ignore[return-value]
    if kind == wire.CONNECT:
        return event[3], CONNECTING  # type: ignore[return-value]
    if kind == wire.CLOSE:
        return event[3], CLOSING  # type: ignore[return-value]
    if kind == wire.BEFORE:
        return ASKING, event[2]  # type: ignore[return-value]
    if kind == REPLAY:
        return REPLAYING, event[2].id  # type: ignore[attr-defined]
    if kind == ALARM:
        return ALARMING, event[3]  # type: ignore[return-value]
    return None


def mark_of_start(key: str) -> Mark:
    """The mark of the start of the room with this key. Two rooms of one mark are as rare as they are
    harmless: the other one is only run alone, too.
    """
    data = key.encode()
    return STARTING, crc32(data) | (adler32(data) & 0x7FFFFFFF) << 32


class Running:
    """The note of this host, open for writing. Makes the file anew: read the one before first.

    Args:
        path: The file, or None: a note that nobody will read, for pools without a host.
        code: Names the code that this host runs, in 63 bits.

    Raises:
        DataDirectoryError: It cannot be made, or the disk is full: a mapped page that finds no room on disk
            would kill the process when it is written.
    """

    def __init__(self, path: Path | None = None, code: int = 0) -> None:
        self._path = path
        self._descriptor = -1
        self._blocks: list[memoryview] = []
        self._free: list[memoryview] = []
        #: Things in progress that are no turn of a room: they are company for a turn, and no suspects.
        self.others = 0
        if path is not None:
            self._open(path)
        self._grow()
        #: Tasks that found no slot, and the one slot that says that there are some.
        self._crowd = 0
        self._crowd_note = self._free.pop()
        head = self._head = self._blocks[0]
        head[_BOOT_HIGH], head[_BOOT_LOW] = _boot_id()
        head[_PID], head[_CODE] = os.getpid(), code
        head[_MAGIC] = MAGIC

    def _open(self, path: Path) -> None:
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.chmod(path.parent, 0o700)
            # A new file: the old one's pages may still be mapped by a process that does not want to end.
            path.unlink(missing_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(path, flags, 0o600)
            os.fchmod(self._descriptor, 0o600)
        except OSError as error:
            raise DataDirectoryError(
                path, error.strerror or str(error), "Make the directory writable for the broker"
            ) from error

    def _grow(self) -> None:
        """Map one more block."""
        start = len(self._blocks) * BLOCK_BYTES
        if self._descriptor < 0:
            block = memoryview(bytearray(BLOCK_BYTES))
        else:
            assert self._path is not None
            try:
                # Room on the disk for every page, or else writing to one may end in SIGBUS.
                os.posix_fallocate(self._descriptor, start, BLOCK_BYTES)
                block = memoryview(mmap.mmap(self._descriptor, BLOCK_BYTES, offset=start))
            except OSError as error:
                raise DataDirectoryError(
                    self._path, error.strerror or str(error), f"Free {BLOCK_BYTES // 1024} KiB of the disk"
                ) from error
        words = block.cast("q")
        self._blocks.append(words)
        ends = range(HEADER_WORDS + SLOT_WORDS, len(words) + 1, SLOT_WORDS)
        self._free += [words[end - SLOT_WORDS : end] for end in reversed(ends)]

    def take(self) -> memoryview:
        """Give a slot to a task: `note[1] = what; note[0] = who` at the beginning, `note[0] = 0` at the end.

        With a full disk and all slots taken it is not kept what further tasks run, only that there are some.
        """
        if not self._free:
            try:
                self._grow()
            except DataDirectoryError:
                self._crowd += 1
                self._note_crowd()
                return memoryview(bytearray(SLOT_WORDS * WORD)).cast("q")
        return self._free.pop()

    def _note_crowd(self) -> None:
        note = self._crowd_note
        note[2] = 1
        note[0] = OTHER if self._crowd else 0

    def give_back(self, note: memoryview) -> None:
        """The task has ended, and so has what it ran."""
        note[0] = note[2] = 0
        if memoryview(note.obj).nbytes == SLOT_WORDS * WORD:  # none of the file's
            self._crowd -= 1
            self._note_crowd()
        else:
            self._free.append(note)

    def enter(self, who: int = OTHER, what: int = 0) -> memoryview:
        """Something begins that is no turn of a room: a static hook, a streamed answer."""
        note = self.take()
        # Its code may be on the processor at any time: it must not let a turn that waits look like the one.
        note[1], note[2] = what, 1
        note[0] = who
        self.others += 1
        return note

    def leave(self, note: memoryview) -> None:
        """It has ended."""
        self.others -= 1
        self.give_back(note)

    def blocked(self, since: bool) -> None:
        """The loop does not answer, or does so again. Called on the watchdog's thread."""
        self._head[_BLOCKED] = int(since)

    def absolve(self) -> None:
        """This host ends for a reason that no turn has to do with: a disk that fails, say."""
        self._head[_ENDED] = NO_TURNS_FAULT

    def close(self) -> None:
        """This host ends because it was told to."""
        self._head[_ENDED] = ENDED_WELL
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def read_left(path: Path) -> Left:
    """Read what the host before this one has left; nothing, if there was none or the machine has died since.

    Raises:
        DataDirectoryError: The file is there and cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return Left(clean=True)
    except OSError as error:
        raise DataDirectoryError(
            path, error.strerror or str(error), "Make the file readable for the broker, or remove it"
        ) from error
    words = memoryview(content)[: len(content) // WORD * WORD].cast("q")
    if len(words) < HEADER_WORDS or words[_MAGIC] != MAGIC or (words[1], words[2]) != _boot_id():
        return Left(clean=True)
    if words[_ENDED] != IN_PROGRESS:
        return Left(clean=words[_ENDED] == ENDED_WELL, code=words[_CODE])
    block_words = BLOCK_BYTES // WORD
    marks = tuple(
        ((words[slot], words[slot + 1]), bool(words[slot + 2]))
        for block in range(0, len(words) - block_words + 1, block_words)
        for slot in range(block + HEADER_WORDS, block + block_words, SLOT_WORDS)
        if words[slot]
    )
    return Left(marks, blocked=bool(words[_BLOCKED]), code=words[_CODE])


def _boot_id() -> tuple[int, int]:
    """What changes each time the machine starts, as two words (random(4), boot_id)."""
    value = int(Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""), 16)
    return (value >> 64) - (1 << 63), (value & (1 << 64) - 1) - (1 << 63)
