"""The ledger: what a gateway knows of its connections, in memory that outlives it.

Owns four pieces of anonymous memory (memfd_create(2)), which the keeper holds beside the sockets:

    ledger   a header of counters, and one row of columns for each slot
    log-a    what is not in a column and not yet in the registry, appended record by record; of the two logs
    one log-b    is in use, and the other takes what is still wanted when the first has grown
    journal  the message of a host that is being carried out

Must not know a socket, or what a record means to a connection: `recovery` reads a former gateway's ledger,
and `outbox` and `lifecycle` write it. Memory, not files: it ends with the sockets that it describes, needs no
disk, and no disk that is full can take it away.

A process may be killed between any two instructions, so each change has one store that makes it count: eight
aligned bytes, which x86-64 and ARM64 write whole. What a killed process has done to its sockets is not noted
but asked of the kernel (`recovery.Position`), so there is no moment in which both could differ.

Invariants:
    G1  a record counts when the length of its log covers it, and records that were committed together count
    together
    G2  `mark[slot]` is the newest effect that was begun on the connection, and `before[slot]` the length of
        its outgoing stream, outbox included, when that effect began; it is stored before the mark
    G3  an effect is begun only when the cursor stands on it, and the cursor never goes back
    G4  a host's message is in the journal from before its first effect until after its last, and then counts
        as executed
    G5  a frame that another gateway might make in another way, since it is compressed, is in the log before
        any of it is sent
    G6  an automatic response, and where the message ends that it answers, are in the log before the one is
        sent and the other consumed
    G7  while the header says that the gateway rests, no effect is in doubt and no socket is touched:
        `consumed[slot]` is what was taken from the socket and `before[slot]` what was given to it
"""

import mmap
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple, Self
from weakref import finalize

from cbor2 import dumps

from storage.errors import BrokerError

#: Version of the layout, and a sign that it is one of ours.
LAYOUT: Final = 0x6C65646765720002
#: Hosts and shards that the header has room for (storage.directory.SHARD_COUNT_MAX).
HOSTS_MAX: Final = 1024
SHARDS_MAX: Final = 1024

# Words of the header.
_LAYOUT, _CAPACITY, EPOCH, HIGH, CURSOR = 0, 1, 2, 3, 4  # EPOCH: how many gateways have had it
_JOURNAL_BASE, _JOURNAL_LENGTH, _JOURNAL_HOST, _JOURNAL_SEQUENCE = 5, 6, 7, 8
_LOG, _LOG_LENGTH = 9, 10  # which log is in use; its length, and behind it the other's
NUMBER: Final = 12  # the highest that any connection was given
ANSWERS: Final = 13  # not 0: some connection may have a time in `answered`
_RESTS: Final = 14
_INCARNATION = 16
_EXECUTED = _INCARNATION + HOSTS_MAX
_DONE = _EXECUTED + HOSTS_MAX
_GENERATION = _DONE + SHARDS_MAX
_HEADER_WORDS: Final = _GENERATION + SHARDS_MAX
#: Bits of the cursor that count the steps of one item; those above count the items.
STEP_BITS: Final = 32
#: Columns of eight bytes for each slot; beside them there is one of a byte.
_WIDE_COLUMNS: Final = 7

#: Size of a log, and of the journal, at first; and to which an emptied log is cut back.
PIECE_BYTES: Final = 256 * 1024
#: A log is rewritten when it has grown to this size, or to twice what was wanted of it the last time.
REWRITE_BYTES: Final = 1024 * 1024

NAMES: Final = ("ledger", "log-a", "log-b", "journal")

# Kinds of records; what stands in their position and payload.
PARTIES: Final = 1  # -; descriptions of the parties, as CBOR
NEWCOMER: Final = 2  # -; head, request and the rest of a newcomer, as CBOR
ENDING: Final = 3  # phase; code, reason, clean, cause, answered, as CBOR
FRAME: Final = 4  # its own ordinal; a frame that is kept for several connections
KEPT: Final = (
    5  # where the frame begins in the outgoing stream; KEPT_HEAD, then the frame unless it is shared
)
DROPPED: Final = 6  # ordinal of the frame; -
CLEARED: Final = 7  # 1: nothing more may be added; -: the outbox is empty
STATE: Final = 8  # 1: there is one, 0: none; the state's CBOR
TAGS: Final = 9  # -; tags blob
FORGOTTEN: Final = 10  # -; -: the connection's row has to go
ANSWERED: Final = 11  # as KEPT, never shared; ANSWER_HEAD, then the frame: an automatic response
ENCODED: Final = 12  # effect; the frame that it sends to those whose window has so many bits (slot)
RULES: Final = 13  # 1: there are some, 0: none; key of a room and its rules as the registry has them, as CBOR

#: Of a kept frame: its ordinal, the effect that sent it (0: none), the ordinal of the shared frame (0: it
#: follows).
KEPT_HEAD: Final = struct.Struct("<QQQ")

#: Of an automatic response: its ordinal, and where the message ends that it answers.
ANSWER_HEAD: Final = struct.Struct("<QQ")

_RECORD: Final = struct.Struct("<IIQQB")


class Record(NamedTuple):
    """One record of a log."""

    kind: int
    slot: int
    number: int
    position: int
    payload: bytes


def rules_record(key: str, rules: bytes | None) -> Record:
    """What a room has set and the registry may not hold yet; None: it has no rules any more."""
    return Record(RULES, 0, 0, rules is not None, dumps((key, rules)))


class LedgerMismatch(BrokerError):
    """A former gateway's ledger is of another version; `found` and `known` are the layouts."""

    def __init__(self, found: int, known: int) -> None:
        self.found = found
        self.known = known
        super().__init__(
            f"the memory of the former gateway has layout {found:#x}, and this broker knows {known:#x}. "
            "Go back to the version that wrote it, or stop and start the broker, which closes all "
            "connections."
        )


class Ledger:
    """See the module. Columns are public: the hot path indexes them directly."""

    __slots__ = (
        "__weakref__",
        "_descriptors",
        "_journal",
        "_logs",
        "_rewrite_at",
        "_tail",
        "answered",
        "base",
        "before",
        "capacity",
        "consumed",
        "cookie",
        "header",
        "mark",
        "number",
        "phase",
    )

    def __init__(self, descriptors: Mapping[str, int]) -> None:
        """Take over the four descriptors; `create` and `adopt` make them."""
        self._descriptors = dict(descriptors)
        finalize(self, _close, tuple(descriptors.values()))
        ledger = mmap.mmap(descriptors["ledger"], 0)
        words = memoryview(ledger)[: _HEADER_WORDS * 8].cast("Q")
        found = words[_LAYOUT]
        if found not in (0, LAYOUT):
            raise LedgerMismatch(found, LAYOUT)
        self.header = words
        self.capacity = capacity = words[_CAPACITY]
        columns = []
        start = _HEADER_WORDS * 8
        for _ in range(_WIDE_COLUMNS):
            columns.append(memoryview(ledger)[start : start + 8 * capacity].cast("Q"))
            start += 8 * capacity
        #: The connection's number, 0 in a free slot; the kernel's name of its socket (SO_COOKIE, socket(7)).
        self.number, self.cookie = columns[0], columns[1]
        #: Bytes that its socket had received when the stream of frames began; and those of the stream that
        #: are done with.
        self.base, self.consumed = columns[2], columns[3]
        self.before, self.mark = columns[4], columns[5]
        #: When the gateway last answered by itself, in milliseconds since 1970; 0: never.
        self.answered = columns[6]
        self.phase = memoryview(ledger)[start : start + capacity]
        self._journal = mmap.mmap(descriptors["journal"], 0)
        self._logs = [mmap.mmap(descriptors["log-a"], 0), mmap.mmap(descriptors["log-b"], 0)]
        self._tail = words[_LOG_LENGTH + words[_LOG]]
        self._rewrite_at = max(REWRITE_BYTES, self._tail)
        words[_LAYOUT] = LAYOUT

    @classmethod
    def create(cls, capacity: int) -> Self:
        """Make an empty one with room for `capacity` slots; memory is taken as slots are used."""
        descriptors = {name: os.memfd_create(f"broker-{name}", os.MFD_CLOEXEC) for name in NAMES}
        os.ftruncate(descriptors["ledger"], 8 * _HEADER_WORDS + (8 * _WIDE_COLUMNS + 1) * capacity)
        os.pwrite(descriptors["ledger"], struct.pack("<Q", capacity), 8 * _CAPACITY)
        for name in NAMES[1:]:
            os.ftruncate(descriptors[name], PIECE_BYTES)
        return cls(descriptors)

    @property
    def descriptors(self) -> Mapping[str, int]:
        """The descriptors of its memory, by name, for the keeper."""
        return self._descriptors

    # --- Hosts and shards -------------------------------------------------------------------------

    def meet_host(self, host: int, incarnation: int, acknowledged: int) -> int:
        """A host of this index has come, to which a gateway has acknowledged so many messages. Gives the
        number of its newest message that has been carried out.
        """
        header = self.header
        if header[_INCARNATION + host] != incarnation:
            header[_EXECUTED + host] = acknowledged
            header[_INCARNATION + host] = incarnation
        elif header[_EXECUTED + host] < acknowledged:
            header[_EXECUTED + host] = acknowledged
        return header[_EXECUTED + host]

    def done(self, shard: int) -> int:
        """Number of the newest outbox row of the shard that has been carried out."""
        return self.header[_DONE + shard]

    def note_done(self, shard: int, sequence: int) -> None:
        """An outbox row has been carried out."""
        self.header[_DONE + shard] = sequence

    def generation(self, shard: int) -> int:
        """The highest generation of the shard that was ever seen."""
        return self.header[_GENERATION + shard]

    def note_generation(self, shard: int, generation: int) -> None:
        """A host with this generation of the shard has come."""
        self.header[_GENERATION + shard] = generation

    # --- The journal ------------------------------------------------------------------------------

    def begin(self, host: int, sequence: int, message: bytes | bytearray) -> None:
        """Before the first effect of a host's message. `host` is HOSTS_MAX for orders that come from none."""
        size = len(message)
        if size > len(self._journal):
            self._journal.resize(max(size, 2 * len(self._journal)))
        self._journal[:size] = message
        header = self.header
        header[_JOURNAL_BASE] = header[CURSOR]
        header[_JOURNAL_HOST] = host
        header[_JOURNAL_SEQUENCE] = sequence
        header[_JOURNAL_LENGTH] = size

    def end(self) -> None:
        """After its last effect."""
        header = self.header
        host = header[_JOURNAL_HOST]
        if host != HOSTS_MAX:
            header[_EXECUTED + host] = header[_JOURNAL_SEQUENCE]
        header[_JOURNAL_LENGTH] = 0
        if len(self._journal) > PIECE_BYTES:
            self._journal.resize(PIECE_BYTES)

    def unfinished(self) -> tuple[bytes, int, int]:
        """The message that a former gateway was carrying out, empty if there is none; how many of its items
        are done, and how many steps of the next one.
        """
        header = self.header
        size = header[_JOURNAL_LENGTH]
        cursor, base = header[CURSOR], header[_JOURNAL_BASE]
        if cursor == base:
            return self._journal[:size], 0, 0
        items = (cursor >> STEP_BITS) - (base >> STEP_BITS) - 1
        return self._journal[:size], items, (cursor & (1 << STEP_BITS) - 1) - 1

    @property
    def in_doubt(self) -> int:
        """What the cursor stands on, if a former gateway was carrying it out; otherwise 0."""
        header = self.header
        cursor = header[CURSOR]
        return cursor if header[_JOURNAL_LENGTH] and cursor != header[_JOURNAL_BASE] else 0

    def rest(self, written: memoryview) -> None:
        """The gateway has stopped, on purpose and between two effects, and has given each socket so many
        bytes of its stream (of 8-byte words, one for each slot in use).
        """
        self.before[: len(written)] = written
        self.header[_RESTS] = 1

    def wake(self) -> bool:
        """Somebody goes on. Gives whether the gateway before rested, so that the kernel need not be asked."""
        rested = bool(self.header[_RESTS])
        self.header[_RESTS] = 0
        return rested

    @property
    def next_item(self) -> int:
        """The number that the cursor gives to the first item of the message in the journal."""
        return (self.header[_JOURNAL_BASE] >> STEP_BITS) + 1

    # --- The log ----------------------------------------------------------------------------------

    def add(self, kind: int, slot: int = 0, number: int = 0, position: int = 0, payload: bytes = b"") -> None:
        """Append a record; it counts from the next `commit` on."""
        self._tail = self._append(
            self._logs[self.header[_LOG]], self._tail, kind, slot, number, position, payload
        )

    def commit(self) -> None:
        """What was added counts now."""
        header = self.header
        header[_LOG_LENGTH + header[_LOG]] = self._tail

    @property
    def is_long(self) -> bool:
        """Whether it is time for `rewrite`."""
        return self._tail >= self._rewrite_at

    def rewrite(self, wanted: Iterable[Record]) -> None:
        """Replace the log by these records."""
        header = self.header
        former = header[_LOG]
        fresh = 1 - former
        log = self._logs[fresh]
        tail = 0
        for record in wanted:
            tail = self._append(log, tail, *record)
        header[_LOG_LENGTH + fresh] = tail
        header[_LOG] = fresh
        header[_LOG_LENGTH + former] = 0
        self._tail = tail
        self._rewrite_at = max(REWRITE_BYTES, 2 * tail)
        if len(self._logs[former]) > 4 * REWRITE_BYTES:
            self._logs[former].resize(PIECE_BYTES)

    def records(self) -> Iterator[Record]:
        """What has been committed to the log, in order."""
        log = self._logs[self.header[_LOG]]
        position, end = 0, self._tail
        while position < end:
            size, slot, number, where, kind = _RECORD.unpack_from(log, position)
            position += _RECORD.size
            yield Record(kind, slot, number, where, log[position : position + size])
            position += size

    @staticmethod
    def _append(
        log: mmap.mmap, tail: int, kind: int, slot: int, number: int, position: int, payload: bytes
    ) -> int:
        size = len(payload)
        start = tail + _RECORD.size
        end = start + size
        if end > len(log):
            log.resize(max(end, 2 * len(log)))
        _RECORD.pack_into(log, tail, size, slot, number, position, kind)
        log[start:end] = payload
        return end


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
