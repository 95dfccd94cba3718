"""What a host does about events that end hosts, and rooms that do not start: the shell around
`hibernation.suspects`.

Owns the host's knowledge of them from its start on: it reads what its predecessor was doing, keeps suspects,
dead letters and quarantine in the shards, and answers the commands that look at them. Must not run room code.
Peers: `hibernation.pool` and `hibernation.probation` (who runs when), `hibernation.commits` (what it stores
rides in the next commit), `storage.blame`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from cbor2 import dumps, loads

from hibernation import wire
from hibernation.alarms import Alarms
from hibernation.cells import Cell, Event, Kind
from hibernation.commits import Commits
from hibernation.configuration import HostConfig
from hibernation.explanation import explain
from hibernation.logs import get_logger
from hibernation.pool import Pool
from hibernation.probation import Probation
from hibernation.running import ALARM, REPLAY, Mark, Running, mark_of, mark_of_start, read_left, running_path
from hibernation.suspects import Suspect, Suspects
from hibernation.turns import Turns
from storage.blame import BlameTables, Letter, Quarantined, SuspectRow
from storage.clock import now
from storage.shards import Shard, ShardBatch

log = get_logger("blame")

#: Bytes of a message that `broker dead-letters show` shows.
SHOWN_BYTES_MAX = 64 * 1024


class Blame:
    """See the module.

    Args:
        config: Of the host.
        shards: The open shards of the host, by index.
        code: Names the code that the host runs.

    Raises:
        DataDirectoryError: The note of running turns cannot be read, or made.
    """

    def __init__(self, config: HostConfig, shards: dict[int, Shard], code: int) -> None:
        self._shards = shards
        self._tables = {index: BlameTables(shard) for index, shard in shards.items()}
        self._settings = config.settings
        self._code = code
        #: Where suspects are kept: their rooms are not known before they come.
        self._home = min(shards, default=-1)
        path = running_path(config.data, config.index)
        left = read_left(path)
        self.suspects = Suspects(config.settings.redelivery_tries)
        self._quarantined: dict[str, Quarantined] = {}
        if shards:
            known = [_suspect(row) for row in self._tables[self._home].suspects()]
            self.suspects = Suspects.at_start(
                known, left, tries=config.settings.redelivery_tries, at=now(), code=code
            )
            self._store_suspects(bool(known))
            self._read_quarantine(clean=left.clean)
        # Only now: what the old note says is in the shard.
        self.running = Running(path, code)
        if self.suspects.by_mark:
            log.warning(
                "the host before this one died: what it was doing is run alone",
                in_progress=len(left.marks),
                suspects=sum(each.alone for each in self.suspects.by_mark.values()),
                blocked=left.blocked,
            )
        #: Set by the host. Alarms of a room that does not start wait until it may be started again.
        self.alarms: Alarms
        self._pool: Pool
        self._commits: Commits
        self._put: Callable[[list[Any]], None]
        self._kinds: dict[str, Kind]
        self._refuse: Callable[[list[Event]], None]

    def attach(
        self,
        pool: Pool,
        turns: Turns,
        commits: Commits,
        kinds: dict[str, Kind],
        put: Callable[[list[Any]], None],
        refuse: Callable[[list[Event]], None],
    ) -> None:
        """Meet the rest of the host, which is made with parts of this.

        Args:
            pool: Runs what is suspected.
            turns: Gives events up, and runs them again.
            commits: Takes what is to be stored.
            kinds: The parties, by every name.
            put: Adds an item to what leaves next.
            refuse: Answers requests that no room can.
        """
        self._pool, self._commits, self._kinds = pool, commits, kinds
        self._put, self._refuse = put, refuse
        pool.on_quarantine = self._on_quarantine
        turns.bury = self._bury
        turns.replayed = self._replayed
        pool.quarantined.update({key: each.reason for key, each in self._quarantined.items()})
        if self.suspects.by_mark:
            pool.suspect(Probation(self.suspects, self._forgotten))

    def greet(self) -> None:
        """A gateway is there: it has to know who is in quarantine."""
        for room in self._quarantined.values():
            self._put([wire.QUARANTINE, room.room, room.reason, room.since])

    # --- What is stored ---------------------------------------------------------------------------

    def _store_suspects(self, had_some: bool) -> None:
        rows = [_row(each) for each in self.suspects.by_mark.values()]
        if not rows and not had_some:
            return
        batch = ShardBatch()
        batch.blaming.acquit_all()
        batch.blaming.suspect(rows)
        self._shards[self._home].commit(batch)

    def _read_quarantine(self, *, clean: bool) -> None:
        for index, tables in self._tables.items():
            ended = []
            for room in tables.quarantined():
                if clean or room.code != self._code:
                    ended.append(room.room)
                else:
                    self._quarantined[room.room] = room
            if ended:
                batch = ShardBatch()
                batch.blaming.release(ended)
                self._shards[index].commit(batch)

    def _forgotten(self, marks: Sequence[Mark]) -> None:
        """Nothing is known of these any more: the next host is not to look out for them."""
        self._commits.blaming(self._home).acquit(marks)
        self._commits.when_stored(_nothing)

    def _bury(self, cell: Cell, event: Event, suspect: Suspect) -> None:
        who, what = suspect.mark
        letter = Letter(None, cell.key, who, what, dumps(event), suspect.deaths, suspect.reason, now())
        self._commits.blaming_of(cell).bury(letter)

    def _on_quarantine(self, cell: Cell, reason: str) -> None:
        room = Quarantined(cell.key, reason, now(), self._code)
        self._quarantined[cell.key] = room
        self._commits.blaming_of(cell).quarantine(room)
        item = [wire.QUARANTINE, room.room, room.reason, room.since]
        # Not as a result, which a host of other code might say again.
        self._commits.after(cell, lambda: self._put(item))
        requests = [event for event in cell.events if event[0] == wire.REQUEST]
        if requests:
            cell.events[:] = [event for event in cell.events if event[0] != wire.REQUEST]
            self._refuse(requests)
        self.alarms.held(cell)

    # --- Commands ---------------------------------------------------------------------------------

    def answer(self, question: str, argument: Any, reply: Callable[[Any], None]) -> bool:
        """Answer a question of a command, at once or when it is done. False: it is none of these."""
        handler = {
            "letters": self._letters,
            "letter": self._letter,
            "replay": self._replay,
            "remove": self._remove,
            "explain": self._explain,
            "release": self._release,
        }.get(question)
        if handler is None:
            return False
        handler(argument, reply)
        return True

    def counts(self) -> dict[str, int]:
        """For `stats`."""
        return {
            "quarantined": len(self._pool.quarantined),
            "suspects": len(self.suspects.by_mark),
            "dead_letters": sum(tables.count() for tables in self._tables.values()),
        }

    def _letters(self, argument: Any, reply: Callable[[Any], None]) -> None:
        shard, after, limit = argument
        reply([_shown(shard, letter) for letter in self._tables[shard].letters(after, limit)])

    def _find(self, argument: Any) -> Letter | None:
        shard, number = argument
        return self._tables[shard].letter(number)

    def _letter(self, argument: Any, reply: Callable[[Any], None]) -> None:
        letter = self._find(argument)
        reply(None if letter is None else _shown(argument[0], letter, whole=True))

    def _remove(self, argument: Any, reply: Callable[[Any], None]) -> None:
        letter = self._find(argument)
        if letter is None:
            reply(None)
            return
        assert letter.id is not None
        self._commits.blaming(argument[0]).remove(letter.id)
        self._commits.when_stored(lambda: reply({"deleted": 1}))

    def _replay(self, argument: Any, reply: Callable[[Any], None]) -> None:
        letter = self._find(argument)
        if letter is None:
            reply(None)
            return
        kind = self._kinds.get(letter.room.split("/", 1)[0])
        if kind is None:
            reply({"error": "the app has no such party any more"})
            return
        if letter.room in self._pool.quarantined:
            reply({"error": f"its room is in quarantine: {self._pool.quarantined[letter.room]}"})
            return
        event: Event = [REPLAY, letter.room, letter, reply]
        mark = mark_of(event)
        assert mark is not None
        if mark in self.suspects.by_mark:
            reply({"error": "it is being replayed"})
            return
        if self._pool.probation is None:
            self._pool.suspect(Probation(self.suspects, self._forgotten))
        assert self._pool.probation is not None
        self._pool.deliver(letter.room, kind, event)
        self._pool.probation.accuse(self._pool.cells[letter.room], mark)

    def _replayed(self, cell: Cell, event: Event, failure: BaseException | None) -> None:
        """The turn of a replayed event has ended. If it went well the letter goes with its commit."""
        _, _, letter, reply = event
        if failure is not None:
            reply({"error": f"its turn failed, so the letter stays: {type(failure).__name__}: {failure}"})
            return
        self._commits.blaming_of(cell).remove(letter.id)
        self._commits.after(cell, lambda: reply({"replayed": 1}))

    def _explain(self, key: str, reply: Callable[[Any], None]) -> None:
        facts = explain(self._pool, key)
        room = self._quarantined.get(key)
        facts |= self.alarms.explain(key)
        facts["quarantine"] = None if room is None else {"reason": room.reason, "since": room.since}
        reply(facts)

    def _release(self, key: str, reply: Callable[[Any], None]) -> None:
        if not self._pool.release(key):
            reply({"released": 0})
            return
        del self._quarantined[key]
        self.alarms.released(key)
        self._commits.blaming(self._commits.shard_of(key)).release([key])
        self.suspects.acquit(mark_of_start(key))
        self._commits.when_stored(lambda: self._say_released(key, reply))

    def _say_released(self, key: str, reply: Callable[[Any], None]) -> None:
        if key not in self._quarantined:  # its start may have failed for good meanwhile
            self._put([wire.QUARANTINE, key, None, 0.0])
        reply({"released": 1})


def _nothing() -> None:
    """What is to be done when suspects are forgotten on disk."""


def _suspect(row: SuspectRow) -> Suspect:
    who, what, deaths, seen, alone, since, reason, code = row
    return Suspect((who, what), deaths, seen, bool(alone), since, reason, code)


def _row(suspect: Suspect) -> SuspectRow:
    return (
        *suspect.mark,
        suspect.deaths,
        suspect.seen,
        int(suspect.alone),
        suspect.since,
        suspect.reason,
        suspect.code,
    )


_KINDS = {wire.CONNECT: "connect", wire.MESSAGE: "message", wire.CLOSE: "close", ALARM: "alarm"}


def _shown(shard: int, letter: Letter, *, whole: bool = False) -> dict[str, Any]:
    """A dead letter as the commands show it."""
    kind, *fields = loads(letter.event)
    if kind == ALARM:
        return _shown_alarm(shard, letter, fields, whole=whole)
    _, _, number, card, state, *rest = fields
    connection_id, uri, tags = wire.read_card(card)
    data = rest[1] if kind == wire.MESSAGE else None
    size = len(data.encode()) if isinstance(data, str) else len(data or b"")
    facts = _facts(shard, letter, kind, connection_id, size)
    if whole:
        facts |= {"number": number, "uri": uri, "tags": list(wire.blob_tags(tags)), "state": state}
        if kind == wire.MESSAGE:
            facts["data"] = rest[1][:SHOWN_BYTES_MAX]
        elif kind == wire.CLOSE:
            facts |= {"code": rest[0], "close_reason": rest[1], "clean": rest[2], "cause": rest[3]}
    return facts


def _shown_alarm(shard: int, letter: Letter, fields: list[Any], *, whole: bool) -> dict[str, Any]:
    _, name, _, scheduled_ms, attempt, payload = fields
    facts = _facts(shard, letter, ALARM, None, len(payload or b""))
    if whole:
        facts |= {"name": name, "scheduled_at": scheduled_ms / 1000, "attempt": attempt + 1}
        facts["payload"] = payload[:SHOWN_BYTES_MAX] if payload is not None else None
    return facts


def _facts(shard: int, letter: Letter, kind: int, connection_id: str | None, size: int) -> dict[str, Any]:
    """What is shown of every dead letter."""
    party, _, room = letter.room.partition("/")
    return {
        "id": f"{shard}.{letter.id}",
        "party": party,
        "room": room,
        "event": _KINDS[kind],
        "connection": connection_id,
        "bytes": size,
        "tries": letter.tries,
        "reason": letter.reason,
        "died_at": letter.died_at,
    }
