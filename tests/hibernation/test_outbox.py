"""Exactly once, whoever dies at whichever step (S22): group commit, outbox, link and what a gateway
remembers, put together as the processes do it, without processes. Disks, sockets and clients are lists.

The model is simple: each input of each client is answered once, in order, and a room's count on disk is the
number of its inputs that count. What outlives a death is what does in the real thing: the disk; what a host
has written to its socket, as long as the gateway lives; the client's bytes that were not consumed; the
gateway's memory of what it has executed.
"""

from collections import deque
from typing import Any

from cbor2 import loads
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import hibernation.commits
from broker import Server
from broker.gateway.ledger import Ledger
from hibernation import wire
from hibernation.cells import Batch, Cell, Kind
from hibernation.commits import Commits
from hibernation.link import Link, StreamDecoder
from hibernation.party import make_parties
from hibernation.room import Room
from hibernation.settings import Settings
from storage.errors import CommitRefused
from storage.shards import Row, ShardBatch
from storage.values import decode, encode

SHARDS = 2
CLIENTS = 4


class Main(Server):
    def on_message(self, message, sender): ...


PARTY = Kind(make_parties([Main])[0], Settings())


class Disk:
    """One shard's file."""

    def __init__(self) -> None:
        self.generation = 0
        self.entries: dict[tuple[str, str], bytes] = {}
        self.rows: dict[int, bytes] = {}


class DiskShard:
    """A shard as a host has it open."""

    checkpoint_due = False

    def __init__(self, disk: Disk, world: "World") -> None:
        self._disk = disk
        self._world = world
        disk.generation += 1
        self._row = disk.generation << 32

    def next_row(self) -> int:
        self._row += 1
        return self._row

    def rows(self) -> list[Row]:
        return sorted(self._disk.rows.items())

    def commit(self, batch: ShardBatch, rows: list[Row] = [], executed: int = 0) -> None:  # noqa: B006
        if self._world.disk_full:
            raise CommitRefused("0.db", "full", "Free some space")
        for number in [number for number in self._disk.rows if number <= executed]:
            del self._disk.rows[number]
        for number, items in rows:
            assert number > max(self._disk.rows, default=0), "R2"
            self._disk.rows[number] = items
        for room, entries in batch.rooms.items():
            for key, value in entries.items():
                assert value is not None
                self._disk.entries[room, key] = value


class StepWriter:
    """The writer thread: a job is done when the test says so."""

    def __init__(self) -> None:
        self.jobs: deque[Any] = deque()
        self._finished: list[tuple[int, BaseException | None]] = []

    def submit(self, job: Any) -> int:
        self.jobs.append(job)
        return 0

    def finish(self) -> None:
        error: BaseException | None = None
        try:
            self.jobs.popleft()()
        except CommitRefused as refused:
            error = refused
        self._finished.append((0, error))

    def completed(self) -> list[tuple[int, BaseException | None]]:
        finished, self._finished = self._finished, []
        return finished


def decoded(data: bytes) -> list[Any]:
    decoder = StreamDecoder()
    decoder.feed(data)
    return list(decoder)


class Host:
    """What `hibernation.host` does, step by step."""

    own_databases: frozenset[str] = frozenset()

    def __init__(self, world: "World", incarnation: int, *, inline: bool) -> None:
        self.world = world
        self.incarnation = incarnation
        self.shards = {index: DiskShard(disk, world) for index, disk in enumerate(world.disks)}
        self.link = Link()
        self.writer = StepWriter()
        shards: Any = self.shards
        writer: Any = self.writer
        self.commits = Commits(shards, SHARDS, writer, inline, self._released)
        self.cells: dict[str, Cell] = {}
        self.events: deque[list[Any]] = deque()
        self.out: list[Any] = []
        self.out_rows: list[tuple[int, int]] = []
        self.sent_rows: deque[tuple[int, int, int]] = deque()
        #: Written by the host, not yet with the kernel.
        self.outgoing: deque[Any] = deque()
        self.connected = False
        for index, shard in self.shards.items():
            for number, items in shard.rows():
                self._put_row(index, number, items)

    def _put_row(self, shard: int, number: int, items: bytes) -> None:
        self.out.append([wire.ROW, shard, number, items])
        self.out_rows.append((shard, number))

    def _released(self, batch: Batch) -> None:
        for shard, rows in batch.rows.items():
            for number, items in rows:
                self._put_row(shard, number, items)
        self.out += batch.late

    def turn(self) -> None:
        _, key, slot, number, counts, end = self.events.popleft()
        cell = self.cells.get(key)
        if cell is None:
            cell = self.cells[key] = Cell(key, PARTY)
        backstage: Any = self
        room = Room(backstage, key, Settings(), {}, cell.connections, cell.pending)
        turn = room._begin()
        blob = room.storage._look("count")
        count = 0 if blob is None else decode(blob)
        if counts:
            count += 1
            room.storage.put("count", count)
        turn.effects.append([wire.SEND, slot, number, f"{end} {count}"])
        turn.room = None
        if turn.stored:
            self.commits.stage(cell, turn)
        result = [wire.TURN, slot, number, end, turn.effects]
        if cell.gate:
            self.commits.hold(cell, result, [])
        else:
            self.out.append(result)

    def read(self, key: str, name: str) -> bytes | None:
        return self.world.disks[self.commits.shard_of(key)].entries.get((key, name))

    def send(self) -> None:
        if not self.out or not self.connected:
            return
        items, self.out = self.out, []
        data = self.link.pack(items)
        self.sent_rows.extend((self.link.sent, *row) for row in self.out_rows)
        self.out_rows.clear()
        self.outgoing.extend(decoded(data))

    def flush(self) -> None:
        self.send()
        if not self.outgoing:
            self.commits.end_round()
            self.send()

    def completed(self) -> None:
        self.commits.completed()
        self.flush()

    def take(self, message: Any) -> None:
        self.events.extend(self.link.take(message))
        self.acknowledged()

    def acknowledged(self) -> None:
        while self.sent_rows and self.sent_rows[0][0] <= self.link.acknowledged:
            _, shard, number = self.sent_rows.popleft()
            self.commits.executed(shard, number)

    def disconnected(self) -> None:
        self.connected = False
        self.outgoing.clear()
        self.events.clear()
        self.commits.forget()
        # It reconnects when all is on disk; cells are dropped then.
        self.commits.end_round()

    def connect(self, received: int, token: int) -> None:
        assert self.commits.idle
        self.cells.clear()
        self.link.resume(received)
        self.acknowledged()
        self.connected = True
        for data in self.link.unacknowledged():
            self.outgoing.extend(decoded(data))
        self.out.append([wire.SYNCED, token])
        self.send()


class HostSeen:
    """What a gateway has of a host: a link and what it has given out."""

    def __init__(self, host: Host, received: int, token: int) -> None:
        self.incarnation = host.incarnation
        self.link = Link(received)
        self.token = token
        self.synced = False
        #: The socket's buffers.
        self.from_host: deque[Any] = deque()
        self.to_host: deque[Any] = deque()


class World(RuleBasedStateMachine):
    """Two rooms in two shards, two clients in each; one host, one gateway, one after another."""

    #: Whether some inputs only read. Then what answers them is in no outbox, and only one process may die at
    #: a time: the other knows it.
    reads = True
    inline = False

    def __init__(self) -> None:
        super().__init__()
        hibernation.commits.log.disabled = True  # type: ignore[attr-defined]
        self.disks = [Disk() for _ in range(SHARDS)]
        self.disk_full = False
        self.inputs: list[list[bool]] = [[] for _ in range(CLIENTS)]
        self.consumed = [0] * CLIENTS
        self.answers: list[list[str]] = [[] for _ in range(CLIENTS)]
        self.ledger = Ledger.create(8)
        self.dispatched = [0] * CLIENTS
        self.hosts = 0
        self.host: Host | None = None
        self.gateway = True
        self.seen: HostSeen | None = None
        self.tokens = 0
        self.tick: list[Any] = []
        # Rooms that lie in different shards.
        keys = [f"main/{number}" for number in range(50)]
        first = next(key for key in keys if wire.partition_of(key) % SHARDS == 0)
        second = next(key for key in keys if wire.partition_of(key) % SHARDS == 1)
        self.rooms = [first, first, second, second]

    # --- Clients and gateway

    @rule(client=st.integers(0, CLIENTS - 1), kinds=st.lists(st.booleans(), min_size=1, max_size=4))
    def send(self, client: int, kinds: list[bool]) -> None:
        self.inputs[client] += [kind or not self.reads for kind in kinds]

    @precondition(lambda self: self.seen is not None and self.seen.synced)
    @rule(client=st.integers(0, CLIENTS - 1), count=st.integers(1, 3))
    def dispatch(self, client: int, count: int) -> None:
        assert self.seen is not None
        items = []
        for _ in range(count):
            position = self.dispatched[client]
            if position < len(self.inputs[client]):
                self.dispatched[client] = position + 1
                counts = self.inputs[client][position]
                number = client + 100
                items.append([wire.MESSAGE, self.rooms[client], client, number, counts, position + 1])
        if items:
            self.seen.to_host.extend(decoded(self.seen.link.pack(items)))

    @precondition(lambda self: self.gateway and self.seen is not None and self.seen.from_host)
    @rule()
    def gateway_reads(self) -> None:
        seen = self.seen
        assert seen is not None
        message = seen.from_host.popleft()
        assert not seen.link.is_gap(message)
        for item in seen.link.take(message):
            self.execute(seen, item)
        self.ledger.begin(0, seen.link.received, b"")
        self.ledger.end()

    def execute(self, seen: HostSeen, item: list[Any]) -> None:
        if item[0] == wire.SYNCED:
            if item[1] == seen.token:
                seen.synced = True
        elif item[0] == wire.ROW:
            _, shard, number, items = item
            if number > self.ledger.done(shard):
                for each in loads(items):
                    self.execute(seen, each)
                self.ledger.note_done(shard, number)
        else:
            _, slot, number, end, effects = item
            assert number == slot + 100
            for _, _, _, text in effects:
                self.answers[slot].append(text)
            assert end == self.consumed[slot] + 1, "an input is consumed out of its turn, or again"
            self.consumed[slot] = end
            self.dispatched[slot] = max(self.dispatched[slot], end)

    @precondition(lambda self: self.gateway and self.seen is not None)
    @rule()
    def gateway_acknowledges(self) -> None:
        assert self.seen is not None
        self.seen.to_host.extend(decoded(self.seen.link.acknowledgement() or b""))

    # --- The host

    @precondition(lambda self: self.host is not None and self.host.events)
    @rule(count=st.integers(1, 3))
    def turns(self, count: int) -> None:
        assert self.host is not None
        for _ in range(min(count, len(self.host.events))):
            self.host.turn()

    @precondition(lambda self: self.host is not None and self.host.connected)
    @rule()
    def flush(self) -> None:
        assert self.host is not None
        self.host.flush()

    @precondition(lambda self: self.host is not None and self.host.connected and self.host.outgoing)
    @rule(count=st.integers(1, 3))
    def kernel_takes(self, count: int) -> None:
        assert self.host is not None
        assert self.seen is not None
        for _ in range(min(count, len(self.host.outgoing))):
            self.seen.from_host.append(self.host.outgoing.popleft())

    @precondition(lambda self: self.host is not None and self.host.writer.jobs)
    @rule()
    def disk_takes(self) -> None:
        assert self.host is not None
        self.host.writer.finish()

    @precondition(lambda self: self.host is not None)
    @rule()
    def completed(self) -> None:
        assert self.host is not None
        self.host.completed()

    @precondition(lambda self: self.host is not None)
    @rule()
    def tries_again(self) -> None:
        assert self.host is not None
        self.host.commits.retry()

    @precondition(lambda self: self.host is not None)
    @rule()
    def tidies(self) -> None:
        assert self.host is not None
        self.host.commits.tidy()

    @precondition(lambda self: self.host is not None and self.host.connected and self.seen.to_host)
    @rule()
    def host_takes(self) -> None:
        assert self.host is not None
        assert self.seen is not None
        self.host.take(self.seen.to_host.popleft())

    @rule(full=st.booleans())
    def disk(self, full: bool) -> None:
        self.disk_full = full

    @rule(
        stages=st.integers(1, 13),
        kinds=st.lists(st.booleans(), min_size=1, max_size=2),
        client=st.integers(0, CLIENTS - 1),
        reads=st.booleans(),
    )
    def goes_on(self, stages: int, kinds: list[bool], client: int, reads: bool) -> None:
        """Everybody does what is next, up to some point of the way of a message: there somebody may die.
        `reads`: the gateway reads what hosts say.
        """
        for stage in range(stages):
            host, seen = self.host, self.seen
            connected = host is not None and host.connected
            if stage == 0 and host is None:
                self.host_comes()
            elif stage == 1 and not self.gateway:
                self.gateway_comes()
            elif stage == 2 and host is not None and not connected and self.gateway and host.commits.idle:
                self.greets()
            elif stage in (3, 10) and connected:
                self.kernel_takes(100)
            elif stage in (4, 11) and seen is not None:
                while reads and seen.from_host:
                    self.gateway_reads()
            elif stage == 5 and seen is not None and seen.synced:
                self.send(client, kinds)
                self.dispatch(client, 3)
            elif stage == 6 and connected and seen is not None:
                while seen.to_host:
                    self.host_takes()
            elif stage == 7 and connected and host is not None:
                self.turns(100)
                self.flush()
            elif stage == 8 and host is not None and host.writer.jobs:
                self.disk_takes()
            elif stage == 9 and host is not None:
                self.completed()
            elif stage == 12 and seen is not None:
                self.gateway_acknowledges()

    # --- Deaths and births

    def settled(self) -> bool:
        """Whether the process that lives knows all that the other one's death could take along."""
        return not self.reads or (
            self.seen is not None and self.seen.synced and self.host is not None and self.host.connected
        )

    @precondition(lambda self: self.host is not None and self.settled())
    @rule()
    def host_dies(self) -> None:
        self.host = None

    @precondition(lambda self: self.gateway and self.settled())
    @rule()
    def gateway_dies(self) -> None:
        self.gateway = False
        self.seen = None
        if self.host is not None and self.host.connected:
            self.host.disconnected()

    @precondition(lambda self: self.host is None)
    @rule()
    def host_comes(self) -> None:
        self.hosts += 1
        self.host = Host(self, self.hosts, inline=self.inline)

    @precondition(lambda self: not self.gateway)
    @rule()
    def gateway_comes(self) -> None:
        self.gateway = True
        self.dispatched = list(self.consumed)

    @precondition(
        lambda self: (
            self.gateway and self.host is not None and not self.host.connected and self.host.commits.idle
        )
    )
    @rule()
    def greets(self) -> None:
        host = self.host
        assert host is not None
        while self.seen is not None and self.seen.from_host:
            self.gateway_reads()  # what the former host has said still counts
        self.dispatched = list(self.consumed)
        received = self.ledger.meet_host(0, host.incarnation, host.link.acknowledged)
        self.tokens += 1
        self.seen = HostSeen(host, received, self.tokens)
        host.connect(received, self.tokens)

    # --- What holds

    @invariant()
    def each_is_answered_once_and_in_order(self) -> None:
        for client, answers in enumerate(self.answers):
            assert [int(each.split()[0]) for each in answers] == list(range(1, len(answers) + 1))
            assert len(answers) == self.consumed[client] <= len(self.inputs[client])

    @invariant()
    def what_was_answered_was_on_disk(self) -> None:
        for client, answers in enumerate(self.answers):
            count = self.count_of(self.rooms[client])
            assert all(int(each.split()[1]) <= count for each in answers)

    def count_of(self, room: str) -> int:
        disk = self.disks[wire.partition_of(room) % SHARDS]
        return int(decode(disk.entries.get((room, "count"), encode(0))))

    def teardown(self) -> None:
        """Everybody lives again: all that is still owed comes, and the outbox is empty in the end."""
        self.disk_full = False
        if not self.gateway:
            self.gateway_comes()
        if self.host is None:
            self.host_comes()
        host = self.host
        assert host is not None
        for _ in range(2000):
            host.commits.retry()
            while host.writer.jobs:
                host.writer.finish()
            host.completed()
            if not host.connected:
                if host.commits.idle:
                    self.greets()
                continue
            if host.outgoing:
                self.kernel_takes(100)
            while host.events:
                host.turn()
            host.flush()
            assert self.seen is not None
            while self.seen.from_host:
                self.gateway_reads()
            if self.seen.synced:
                for client in range(CLIENTS):
                    self.dispatch(client, 10)
            self.gateway_acknowledges()
            while self.seen.to_host:
                self.host_takes()
            host.commits.tidy()
            if all(map(int.__eq__, self.consumed, map(len, self.inputs))) and not any(
                disk.rows for disk in self.disks
            ):
                break
        self.each_is_answered_once_and_in_order()
        for client in range(CLIENTS):
            assert self.consumed[client] == len(self.inputs[client])
        for room in dict.fromkeys(self.rooms):
            of_room = [client for client in range(CLIENTS) if self.rooms[client] == room]
            counted = sorted(
                int(answer.split()[1])
                for client in of_room
                for answer, counts in zip(self.answers[client], self.inputs[client], strict=True)
                if counts
            )
            assert counted == list(range(1, len(counted) + 1))
            assert self.count_of(room) == len(counted)
        assert not any(disk.rows for disk in self.disks)


class WritesOnly(World):
    """Every input counts: both may die, in any order, again and again."""

    reads = False


class Inline(World):
    """S21: with durability os commits are made on the loop."""

    inline = True


TestOneDiesAtATime = World.TestCase
TestWhoeverDies = WritesOnly.TestCase
TestCommitsOnTheLoop = Inline.TestCase
TestOneDiesAtATime.settings = TestWhoeverDies.settings = TestCommitsOnTheLoop.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None
)
