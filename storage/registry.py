"""Who is connected: connections, their tags and state, and the closes that are still to be told; and what
rooms have told the gateway to answer by itself.

Owns one database per gateway. Its peer is the gateway's hub, which stages the changes of a tick in a
`RegistryBatch`, has it committed by the writer thread before it passes the events on, and answers queries
from here, in pages, touching no socket and waking no room. Must not know sockets, slots, or what a state
or a rule means.

A connection's row is written when it has been accepted and deleted when its `on_close` has been acknowledged;
in between, from its close on, it is *closing*: no query lists it, `surviving` does.

Cost of a query: it walks the index of the room, id or tag that selects best, from `after` on, so it grows
    with the
matches in the room and with the page, never with the connections of other rooms. Without a room it walks all
rows.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from storage.database import RESERVE_BYTES, DatabaseFile, RowStatement
from storage.errors import StorageLimitError, ValueEncodingError
from storage.migrations import REGISTRY

CACHE_KIB = 256
"""Page cache of the writing connection."""

READ_CACHE_KIB = 128
"""Page cache of the reading connection."""

PAGE_ROWS_MAX = 4096
"""Largest `limit` of a query."""

SURVIVING_PAGE_ROWS = 1024
"""Rows that a gateway which takes over reads at once."""

FILTER_TAGS_MAX = 64
"""Tags in one filter: as many as a connection can have by default (S11)."""

_SAMPLE_ROWS = 512
"""Rows counted at most to find the rarest of several required tags."""

_OPEN = RowStatement(
    "INSERT INTO connections (room_hash, id, number, party, room, uri, accepted_at, address, tags) VALUES",
    "(?, ?, ?, ?, ?, ?, ?, ?, ?)",
)
_TAG = RowStatement("INSERT INTO tags (room_hash, tag, number) VALUES", "(?, ?, ?)")
_TAG_AGAIN = RowStatement(
    "INSERT INTO tags (room_hash, tag, number) SELECT changed.* FROM (VALUES",
    "(?, ?, ?)",
    ") AS changed JOIN connections AS c ON c.number = changed.column3",
)
_UNTAG = RowStatement("DELETE FROM tags WHERE number IN (", "?", ")")
_FORGET = RowStatement("DELETE FROM connections WHERE number IN (", "?", ")")
_RETAG = RowStatement(
    "UPDATE connections SET tags = changed.column2 FROM (VALUES",
    "(?, ?)",
    ") AS changed WHERE number = changed.column1",
)
_STATE = RowStatement(
    "UPDATE connections SET state = changed.column2 FROM (VALUES",
    "(?, ?)",
    ") AS changed WHERE number = changed.column1",
)
_CLOSING = RowStatement(
    "UPDATE connections SET close_code = changed.column2, close_reason = changed.column3,"
    " close_clean = changed.column4, close_cause = changed.column5 FROM (VALUES",
    "(?, ?, ?, ?, ?)",
    ") AS changed WHERE number = changed.column1",
)
_RULES = RowStatement(
    "INSERT INTO auto_responses (room, rules) VALUES",
    "(?, ?)",
    "ON CONFLICT (room) DO UPDATE SET rules = excluded.rules",
)
_NO_RULES = RowStatement("DELETE FROM auto_responses WHERE room IN (", "?", ")")
_HIGHEST = "UPDATE numbers SET highest = max(highest, ?)"

_COLUMNS = (
    "c.number, c.party, c.room, c.id, c.uri, c.accepted_at, c.tags, c.state,"
    " c.close_code, c.close_reason, c.close_clean, c.close_cause, c.address"
)


class Closing(NamedTuple):
    """How a connection ended, kept until its room has been told."""

    code: int
    reason: str
    clean: bool
    cause: str


class Row(NamedTuple):
    """One connection as committed."""

    number: int
    party: str
    room: str
    id: str
    uri: str
    accepted_at: float
    """Seconds since 1970."""
    tags: tuple[str, ...]
    state: bytes | None
    closing: Closing | None
    """None while it is open."""
    address: str
    """The client's address, as far as its connections are counted by it; empty where they are not."""


class RegistryBatch:
    """Changes to the registry, staged in order and coalesced per connection. Touches no disk.

    A connection is known by its number; of several changes to one thing of it the last counts, and one that
    is opened and forgotten in the same batch leaves no row. Texts are checked here (ValueEncodingError),
    since one that SQLite refuses would fail the whole batch. A batch belongs to the thread that fills it
    until it is handed to `Registry.commit`, and is not filled after.
    """

    __slots__ = (
        "_blobs",
        "_closings",
        "_forgotten",
        "_highest",
        "_opened",
        "_states",
        "_tags",
        "auto_responses",
    )

    def __init__(self) -> None:
        # Ready for SQLite: whatever the writer thread does in Python holds up the loop thread in one piece.
        self._opened: dict[int, tuple[int, str, int, str, str, str, float, str]] = {}
        self._blobs: dict[int, bytearray] = {}
        self._tags: dict[int, list[tuple[int, str, int]]] = {}
        self._states: dict[int, bytes | None] = {}
        self._closings: dict[int, tuple[int, str, bool, str]] = {}
        self._forgotten: set[int] = set()
        self._highest = 0
        #: Rules of rooms, by the rooms' keys; None: there are none any more.
        self.auto_responses: dict[str, bytes | None] = {}

    def open(
        self,
        number: int,
        party: str,
        room: str,
        id: str,  # noqa: A002 - the word of the domain, and of the column
        uri: str,
        accepted_at: float,
        tags: Sequence[str] = (),
        address: str = "",
    ) -> None:
        """Add an accepted connection.

        Args:
            number: its number, greater than 0, never used before in this data directory.
            party: name of its party.
            room: id of its room.
            id: its own id.
            uri: what it asked for.
            accepted_at: seconds since 1970.
            tags: its tags, if they are known already.
            address: where it comes from, for the bound of connections from one address; empty if not counted.
        """
        _require_text(party, room, id, uri)
        key = room_hash(party, room)
        if tags:
            self._tag(number, key, tags)
        self._opened[number] = (key, id, number, party, room, uri, accepted_at, address)
        if number > self._highest:  # noqa: PLR1730 - max() costs a call for each connection
            self._highest = number

    def tags(self, number: int, party: str, room: str, tags: Iterable[str]) -> None:
        """Replace all tags of a connection; duplicates are folded, the order is kept."""
        self._tag(number, room_hash(party, room), tags)

    def _tag(self, number: int, key: int, tags: Iterable[str]) -> None:
        folded = _folded(tags)
        self._tags[number] = [(key, tag, number) for tag in folded]
        self._blobs[number] = _blob(folded)

    def state(self, number: int, blob: bytes | None) -> None:
        """Replace the state of a connection; None for none."""
        self._states[number] = blob

    def closing(self, number: int, code: int, reason: str, clean: bool, cause: str) -> None:
        """Record how a connection ended: queries no longer list it, `surviving` does."""
        _require_text(reason, cause)
        self._closings[number] = (code, reason, clean, cause)

    def forget(self, number: int) -> None:
        """Remove a connection: its room has been told, or need not be."""
        self._tags.pop(number, None)
        self._blobs.pop(number, None)
        self._states.pop(number, None)
        self._closings.pop(number, None)
        if self._opened.pop(number, None) is None:
            self._forgotten.add(number)

    def merge(self, later: "RegistryBatch") -> None:
        """Stage on top of this batch all that `later` holds, as when this one was refused and goes again."""
        for number in later._forgotten:
            self.forget(number)
        self._opened.update(later._opened)
        self._blobs.update(later._blobs)
        self._tags.update(later._tags)
        self._states.update(later._states)
        self._closings.update(later._closings)
        self.auto_responses.update(later.auto_responses)
        self._highest = max(self._highest, later._highest)

    def changes(self) -> Iterator[tuple[str, int, bytes | None]]:
        """Give what is staged of connections that have a row: ("state", number, blob), ("tags", number, blob)
        and ("forgotten", number, None).
        """
        for number, state in self._states.items():
            yield "state", number, state
        for number, blob in self._blobs.items():
            yield "tags", number, bytes(blob)
        for number in self._forgotten:
            yield "forgotten", number, None

    def __bool__(self) -> bool:
        return bool(
            self._opened
            or self._tags
            or self._states
            or self._closings
            or self._forgotten
            or self._highest
            or self.auto_responses
        )


class Registry:
    """The registry of one gateway, open for this process alone.

    `commit` is for the writer thread; everything else for the loop thread.

    Args:
        directory: the data directory.
        durability: "full": a commit survives a power cut, so that every close can be told after one (S35);
            "os": the death of any process.
        reserve_bytes: free space below which commits are refused.

    Raises:
        DataDirectoryInUse: another process has it open.
        SchemaTooNew, DatabaseDamaged, DataDirectoryError: see `storage.database.open_database`.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        durability: Literal["full", "os"] = "full",
        reserve_bytes: int = RESERVE_BYTES,
    ) -> None:
        self._file = DatabaseFile(
            registry_path(directory),
            REGISTRY,
            synchronous="full" if durability == "full" else "normal",
            cache_kib=CACHE_KIB,
            read_cache_kib=READ_CACHE_KIB,
            reserve_bytes=reserve_bytes,
        )
        try:
            ((highest, has_rules),) = self._file.read(
                "SELECT max(highest, coalesce((SELECT max(number) FROM connections), 0)),"
                " EXISTS (SELECT 1 FROM auto_responses) FROM numbers"
            )
        except BaseException:
            self._file.close()
            raise
        self._first: int = highest + 1
        self._has_rules = bool(has_rules)

    @property
    def path(self) -> Path:
        """The database's file."""
        return self._file.path

    def next_number(self) -> int:
        """Give the first number that this process may use: greater than every number ever committed."""
        return self._first

    def commit(self, batch: RegistryBatch) -> None:
        """Write a batch in one transaction: all of it or nothing. On one thread at a time.

        Raises:
            CommitRefused: nothing was written (disk full, say); the same batch may be committed again.
            CommitUnknown: the outcome is not known; the process must end.
        """
        if not batch:
            return
        blobs = batch._blobs
        none = bytearray()
        # In the order of the indexes, so that each of their pages is visited once: a registry of many rooms
        # has far more pages than the cache.
        opened = [(*row, blobs.get(row[2], none)) for row in sorted(batch._opened.values())]
        retagged = [(number, blob) for number, blob in blobs.items() if number not in batch._opened]
        tagged_again = sorted(chain.from_iterable([batch._tags[number] for number, _ in retagged]))
        tagged = sorted(
            chain.from_iterable(batch._tags[number] for number in batch._opened if number in batch._tags)
        )
        with self._file.transaction() as writer:
            if batch._highest:
                writer.execute(_HIGHEST, (batch._highest,))
            gone = [(number,) for number in sorted(batch._forgotten)]
            _UNTAG.run(writer, gone + [(number,) for number, _ in retagged])
            _FORGET.run(writer, gone)
            _OPEN.run(writer, opened)
            _TAG.run(writer, tagged)
            # What was changed after it was forgotten has no row any more, and must not leave tags behind.
            _TAG_AGAIN.run(writer, tagged_again)
            _RETAG.run(writer, retagged)
            _STATE.run(
                writer,
                [(number, state and bytearray(state)) for number, state in batch._states.items()],
            )
            _CLOSING.run(
                writer,
                [
                    (number, code, reason, int(clean), cause)
                    for number, (code, reason, clean, cause) in batch._closings.items()
                ],
            )
            rules = batch.auto_responses
            _RULES.run(writer, [(room, bytearray(blob)) for room, blob in rules.items() if blob is not None])
            _NO_RULES.run(writer, [(room,) for room, blob in rules.items() if blob is None])
        if batch.auto_responses:
            self._has_rules = True

    def auto_responses(self, room: str) -> bytes | None:
        """What is kept of a room's automatic responses, by its key; None: nothing. Costs nothing as long as
        no room has any.
        """
        if not self._has_rules:
            return None
        rows = self._file.read("SELECT rules FROM auto_responses WHERE room = ?", (room,))
        return rows[0][0] if rows else None

    def surviving(self) -> Iterator[Row]:
        """Give every row that a former gateway left, also those closing, in the order of acceptance, page by
        page.
        """
        after = 0
        while True:
            rows = self._file.read(
                f"SELECT {_COLUMNS} FROM connections AS c WHERE c.number > ? AND c.number < ?"
                f" ORDER BY c.number LIMIT {SURVIVING_PAGE_ROWS}",
                (after, self._first),
            )
            for row in rows:
                yield _row(row)
            if len(rows) < SURVIVING_PAGE_ROWS:
                return
            after = rows[-1][0]

    def query(
        self,
        party: str | None = None,
        room: str | None = None,
        id: str | None = None,  # noqa: A002 - as in RegistryBatch.open
        all_of: Sequence[str] = (),
        any_of: Sequence[str] = (),
        none_of: Sequence[str] = (),
        after: int = 0,
        limit: int = 256,
    ) -> list[Row]:
        """Give one page of the open connections that match, in the order in which they were accepted.

        Args:
            party: only of this party.
            room: only of the room of this id.
            id: only with this connection id.
            all_of: tags that it has, all of them.
            any_of: tags of which it has one at least; empty for no such condition.
            none_of: tags of which it has none.
            after: only numbers greater than this; the number of the last row gives the next page.
            limit: rows of the page, 1 to 4096.

        Raises:
            StorageLimitError: `limit` is over its bound, or the filter names more than 64 tags.
            ValueEncodingError: a text holds a lone surrogate.
        """
        if limit > PAGE_ROWS_MAX:
            raise StorageLimitError("the limit of a query (rows)", limit, PAGE_ROWS_MAX, "Ask for more pages")
        if limit <= 0:
            return []
        sql, parameters = self._matches(_COLUMNS, party, room, id, all_of, any_of, none_of, after, limit)
        return [_row(row) for row in self._file.read(sql, parameters)]

    def count(
        self,
        party: str | None = None,
        room: str | None = None,
        id: str | None = None,  # noqa: A002 - as in RegistryBatch.open
        all_of: Sequence[str] = (),
        any_of: Sequence[str] = (),
        none_of: Sequence[str] = (),
    ) -> int:
        """Count the open connections that match; arguments and errors as of `query`."""
        sql, parameters = self._matches("c.number", party, room, id, all_of, any_of, none_of, 0, -1)
        ((count,),) = self._file.read(f"SELECT count(*) FROM ({sql})", parameters)
        return int(count)

    @property
    def wal_bytes(self) -> int:
        """Size of the write-ahead log."""
        return self._file.wal_bytes

    def check(self) -> None:
        """Read the whole file; raises DatabaseDamaged if it is inconsistent. Not on a loop thread."""
        self._file.check()

    def close(self) -> None:
        """Close and release the registry. Idempotent."""
        self._file.close()

    def _matches(
        self,
        columns: str,
        party: str | None,
        room: str | None,
        name: str | None,
        all_of: Sequence[str],
        any_of: Sequence[str],
        none_of: Sequence[str],
        after: int,
        limit: int,
    ) -> tuple[str, list[Any]]:
        """A SELECT of the connections that match, each once, and its parameters."""
        required, wanted, refused = _folded(all_of), _folded(any_of), _folded(none_of)
        total = len(required) + len(wanted) + len(refused)
        if total > FILTER_TAGS_MAX:
            raise StorageLimitError("the filter (tags)", total, FILTER_TAGS_MAX, "Use fewer tags")
        _require_text(party or "", room or "", name or "")
        if len(wanted) == 1:
            required, wanted = _folded((*required, *wanted)), ()

        tests, values = "c.close_code IS NULL", []
        for column, value in (("party", party), ("room", room), ("id", name)):
            if value is not None:
                tests += f" AND c.{column} = ?"
                values.append(value)
        has_any = "EXISTS (SELECT 1 FROM tags AS h WHERE h.number = c.number AND h.tag IN ({}))"

        key = None if party is None or room is None else room_hash(party, room)
        drivers: tuple[str, ...] = ()
        if key is not None and name is None:
            if required:
                drivers = (self._rarest(key, required),)
                required = tuple(tag for tag in required if tag not in drivers)
            else:
                drivers, wanted = wanted, ()
        for tag in required:
            tests += f" AND {has_any.format('?')}"
            values.append(tag)
        if wanted:
            tests += f" AND {has_any.format(_marks(wanted))}"
            values += wanted
        if refused:
            tests += f" AND NOT {has_any.format(_marks(refused))}"
            values += refused

        if drivers:
            # CROSS JOIN keeps this order: from the tag to its connections, never from the room's connections
            # to the tag.
            branch = (
                "SELECT {} FROM tags AS t INDEXED BY tags_by_room"
                " CROSS JOIN connections AS c ON c.number = t.number"
                f" WHERE t.room_hash = ? AND t.tag = ? AND t.number > ? AND {tests} ORDER BY t.number LIMIT ?"
            )
            parameters: list[Any] = []
            for tag in drivers:
                parameters += [key, tag, after, *values, limit]
            if len(drivers) == 1:
                return branch.format(columns), parameters
            # Each branch gives its first `limit` numbers, so the union holds the first `limit` of all.
            union = " UNION ".join([f"SELECT number FROM ({branch.format('t.number')})"] * len(drivers))
            numbers = f"{union} ORDER BY 1 LIMIT ?"
            sql = f"SELECT {columns} FROM connections AS c WHERE c.number IN ({numbers}) ORDER BY c.number"
            return sql, [*parameters, limit]
        if key is not None:
            index = "connections_by_room" if name is None else "connections_by_id"
            source, parameters = f"connections AS c INDEXED BY {index} WHERE c.room_hash = ? AND", [key]
        else:
            source, parameters = "connections AS c NOT INDEXED WHERE", []
        return (
            f"SELECT {columns} FROM {source} c.number > ? AND {tests} ORDER BY c.number LIMIT ?",
            [*parameters, after, *values, limit],
        )

    def _rarest(self, key: int, tags: tuple[str, ...]) -> str:
        """Of several tags the rarest in the room, as far as a bounded count shows."""
        if len(tags) == 1:
            return tags[0]
        one = "(SELECT count(*) FROM (SELECT 1 FROM tags WHERE room_hash = ? AND tag = ? LIMIT ?))"
        parameters: list[Any] = []
        for tag in tags:
            parameters += [key, tag, _SAMPLE_ROWS]
        (counts,) = self._file.read(f"SELECT {', '.join([one] * len(tags))}", parameters)
        return tags[counts.index(min(counts))]


def registry_path(directory: str | os.PathLike[str]) -> Path:
    """Where the registry lies in a data directory."""
    return Path(directory) / "registry.db"


def room_hash(party: str, room: str) -> int:
    """Give the 64-bit hash, as SQLite's signed integer, by which the registry's indexes know a room."""
    return int.from_bytes(blake2b(f"{party}/{room}".encode(), digest_size=8).digest(), "big", signed=True)


def _row(row: tuple[Any, ...]) -> Row:
    number, party, room, name, uri, accepted_at, tags, state, code, reason, clean, cause, address = row
    return Row(
        number,
        party,
        room,
        name,
        uri,
        accepted_at,
        tuple([tag.decode() for tag in tags.split(b"\xff")[1:-1]]) if tags else (),
        state,
        None if code is None else Closing(code, reason, bool(clean), cause),
        address,
    )


def _blob(tags: tuple[str, ...]) -> bytearray:
    """Tags in one blob, each between two bytes that UTF-8 never holds: a whole tag is found by one search."""
    if not tags:
        return bytearray()
    return bytearray(b"\xff%b\xff" % b"\xff".join([tag.encode() for tag in tags]))


def _folded(tags: Iterable[str]) -> tuple[str, ...]:
    folded = tuple(dict.fromkeys(tags))
    if folded:
        _require_text(*folded)
    return folded


def _require_text(*texts: str) -> None:
    if not "".join(texts).isascii():
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueEncodingError(
                    f"the text {text[:80]!r} holds a lone surrogate, which UTF-8 cannot hold",
                    "Use another text",
                ) from None


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))
