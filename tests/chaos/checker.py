"""Reads a history and says what is wrong with it. Pure: events in, findings out.

Owns the rules by which a run is judged, one connection and one room at a time, and the silence that clients
saw. Knows neither processes nor files. Peers: `history` (the format), `planting` (faults that it has to
find).

What clients write (`who` is client), with sequence n from 1 for messages:

    connect  {"tags": […], "plain": bool}     open                       refused  reason
    send n   [kind, argument]                 frame  what came, below    leave    close, reset or half
    end      [how, code]                      finish  the run has come to its end, and nothing is under way

Frames, as a room sends them. T is the number of the room's turn among those that wrote, `count` that of the
connection's turns that wrote, `last` the message of the one before:

    h T times tags, then g token               the connect turn
    e n token size ok, L n token size ok       random bytes, few and many
    l n token ok                               a large message
    s n value                                  connection state, counted
    p n token        P connection n tag token  a broadcast from a turn that writes nothing
    b n T count last token   B T connection n tag token   one from a turn that writes
    c, x, f n T count last    t n T count last tags       counted; x closes, f is the last, t changes tags
    ? text                                     none of these

The truth of a room is one event with its T and, by connection, k [times, T], c [count, last], x a list of
[T, code, cause, count, last], and b by T [connection, n, tag, token].

A client that leaves has no claim on what was not yet answered; what it said before an orderly end is
nevertheless handled. A client that resets has not even that: there, what is stored must be what a first part
of its messages would have stored.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.history import Event

__all__ = ["KINDS", "Finding", "Report", "check", "check_room", "split"]

#: What may be found, in the order of the report.
KINDS = (
    "dropped",
    "lost",
    "doubled",
    "reordered",
    "early",
    "torn",
    "close missing",
    "close doubled",
    "broadcast missing",
    "broadcast doubled",
    "broadcast astray",
    "unfinished",
)

DURABLE = frozenset("cbtxf")
REPLIES = frozenset("espLl") | DURABLE
#: A kill up to this long before a silence began may be its cause.
BLAME_SECONDS = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with the lines that show it."""

    kind: str
    room: str
    connection: str
    text: str
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{self.kind}: {self.room}/{self.connection}: {self.text}"
        return "\n    ".join((head, *self.lines))


@dataclass(order=True)
class Silence:
    """The longest time that a client waited while nothing came."""

    seconds: float = 0.0
    began: float = 0.0
    connection: str = ""


@dataclass
class Report:
    """What came of a check: findings, and how much was looked at."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    silences: list[Silence] = field(default_factory=list)
    """The longest of each connection, none of no length."""
    handshakes: list[Silence] = field(default_factory=list)
    """How long each waited for its 101."""

    def merge(self, other: "Report") -> None:
        self.findings += other.findings
        self.counts += other.counts
        self.silences += other.silences
        self.handshakes += other.handshakes

    def of(self, kind: str) -> list[Finding]:
        """The findings of one kind."""
        return [finding for finding in self.findings if finding.kind == kind]


class _Connection:
    """What is known of one connection while its events are read in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked_at = 0.0
        self.opened = False
        self.refused = False
        self.left: Event | None = None
        self.ended: Event | None = None
        self.sent: list[Event] = []
        self.next = 1
        self.answered: set[int] = set()
        self.skipped: dict[int, Event] = {}
        self.frames = 0
        self.hello: Event | None = None
        #: The last frame was the first of the connect turn.
        self.greeting = False
        #: T of each frame that has one, in the order of arrival, and the highest.
        self.turns: list[int] = []
        self.turn = 0
        #: The highest that came before it left: up to there it has a claim on everything.
        self.claim = 0
        self.tags: list[tuple[int, frozenset[str]]] = []
        #: Messages whose turn writes, in order; index of each, from 1; how many more were counted.
        self.durable: list[int] = []
        self.durable_index: dict[int, int] = {}
        self.surplus = 0
        self.count = 0
        self.states = 0
        self.state_index: dict[int, int] = {}
        self.state_surplus = 0
        #: n and T of replies that have a T, in order.
        self.marks: list[tuple[int, int]] = []
        self.broadcasts: dict[int, Event] = {}
        self.plain: dict[tuple[str, int], tuple[Event, int]] = {}
        self.waiting_since: float | None = None
        self.silence = Silence()

    def tags_at(self, turn: int) -> frozenset[str]:
        """Its tags after the turn with this number."""
        index = bisect_right(self.tags, turn, key=lambda each: each[0])
        return self.tags[index - 1][1] if index else frozenset()

    def constant(self, tag: str, low: int, high: int) -> bool:
        """Whether it had the tag at all times from one turn to the other."""
        if tag not in self.tags_at(low):
            return False
        return all(tag in tags for turn, tags in self.tags if low < turn <= high)

    @property
    def orderly(self) -> bool:
        """Whether all that it has sent has to be handled."""
        if self.left is not None:
            return bool(self.left.detail != "reset")
        return self.ended is None or (bool(self.sent) and self.sent[-1].detail[0] == "x")


class _Room:
    """The check of one room."""

    def __init__(self, name: str, kills: list[Event]) -> None:
        self.name = name
        self.report = Report()
        self._kills = kills
        self._connections: dict[str, _Connection] = {}
        self._attempts: dict[tuple[str, int], list[Any]] = defaultdict(list)
        self._journaled = False
        self._tokens: dict[tuple[str, int], tuple[str, Event]] = {}
        self._turns: dict[int, tuple[tuple[str, int], Event]] = {}
        #: T of each broadcast: connection, n, tag.
        self._broadcasts: dict[int, tuple[str, int, str]] = {}
        self._plain: dict[tuple[str, int], str] = {}
        self._truth: Event | None = None

    def find(self, kind: str, connection: str, text: str, *events: Event | None) -> None:
        """Write down a finding, with the kills shortly before its last event."""
        known = [event for event in events if event is not None]
        if known:
            until = max(event.time for event in known)
            since = min(event.time for event in known) - BLAME_SECONDS
            first = bisect_left(self._kills, since, key=lambda kill: kill.time)
            last = bisect_right(self._kills, until, key=lambda kill: kill.time)
            known += self._kills[first:last][-6:]
            known.sort(key=lambda event: event.time)
        self.report.findings.append(
            Finding(kind, self.name, connection, text, tuple(str(event) for event in known))
        )

    # --- One event after the other ----------------------------------------------------------------

    def take(self, event: Event) -> None:
        """The next event of this room."""
        if event.who == "room":
            self._journaled = True
            key = (event.connection, event.sequence)
            attempts = self._attempts[key]
            attempts.append(event.detail)
            self.report.counts["attempts"] += 1
            if len(attempts) > 1 and event.sequence:
                self.report.counts["turns run again"] += 1
            return
        if event.who == "truth":
            self._truth = event
            return
        connection = self._connections.get(event.connection)
        if connection is None:
            connection = self._connections[event.connection] = _Connection(event.connection)
        match event.event:
            case "connect":
                connection.asked_at = event.time
            case "open":
                connection.opened = True
                self.report.counts["connections"] += 1
                waited = event.time - connection.asked_at
                self.report.handshakes.append(Silence(waited, connection.asked_at, event.connection))
            case "refused":
                connection.refused = True
                self.report.counts["handshakes refused"] += 1
            case "send":
                self._sent(connection, event)
            case "frame":
                self._frame(connection, event)
            case "leave":
                connection.left = event
                connection.waiting_since = None
            case "end":
                self._ended(connection, event)

    def _sent(self, connection: _Connection, event: Event) -> None:
        connection.sent.append(event)
        self.report.counts["messages"] += 1
        kind = event.detail[0]
        if kind in DURABLE:
            connection.durable.append(event.sequence)
            connection.durable_index[event.sequence] = len(connection.durable)
        elif kind == "s":
            connection.states += 1
            connection.state_index[event.sequence] = connection.states
        if connection.waiting_since is None:
            connection.waiting_since = event.time

    def _ended(self, connection: _Connection, event: Event) -> None:
        connection.ended = event
        connection.waiting_since = None
        if connection.left is not None or not connection.opened:
            return
        asked = connection.sent and connection.sent[-1].detail[0] == "x"
        if asked and event.detail[1] == 4001 and len(connection.sent) in connection.answered:
            return
        self.find("dropped", connection.name, f"the socket ended by itself: {event.detail}", event)

    def _frame(self, connection: _Connection, event: Event) -> None:
        frame = event.detail
        kind = frame[0]
        self.report.counts["frames"] += 1
        connection.frames += 1
        self._heard(connection, event)
        if not connection.opened:
            self.find("early", connection.name, "a frame before the 101", event)
        if kind == "h":
            self._hello(connection, event)
            return
        if connection.hello is None:
            self.find("early", connection.name, "a frame before those of the connect turn", event)
        elif connection.greeting != (kind == "g"):
            if connection.greeting:
                self.find("early", connection.name, "a frame between those of the connect turn", event)
            else:
                self.find("doubled", connection.name, "the second frame of the connect turn again", event)
        connection.greeting = False
        if kind == "g":
            self._token(connection.name, 0, frame[1], event)
        elif kind == "B":
            self._durable_broadcast(connection, event)
        elif kind == "P":
            self._plain_broadcast(connection, event)
        elif kind in REPLIES:
            self._reply(connection, event)
        else:
            self.find("torn", connection.name, "a frame that no room has sent", event)

    def _heard(self, connection: _Connection, event: Event) -> None:
        since = connection.waiting_since
        if since is None:
            return
        if event.time - since > connection.silence.seconds:
            connection.silence = Silence(event.time - since, since, connection.name)
        # A reply to the last message ends the waiting; anything else only begins it anew.
        last = event.detail[0] in REPLIES and event.detail[1] >= len(connection.sent)
        connection.waiting_since = None if last else event.time

    def _hello(self, connection: _Connection, event: Event) -> None:
        _, turn, times, tags = event.detail
        if connection.hello is not None:
            self.find("doubled", connection.name, "two hellos", connection.hello, event)
            return
        if connection.frames != 1:
            self.find("early", connection.name, "its hello is not its first frame", event)
        connection.hello = event
        connection.greeting = True
        connection.tags.append((turn, frozenset(tags)))
        if times > 1:
            self.find("doubled", connection.name, f"its connect turn was committed {times} times", event)
        self._turn(connection, turn, (connection.name, 0) if times else None, event)
        connection.marks.append((0, turn))

    def _turn(self, connection: _Connection, turn: int, source: tuple[str, int] | None, event: Event) -> None:
        """A frame that says in which turn of the room it was made."""
        if turn < connection.turn:
            self.find(
                "reordered", connection.name, f"turn {turn} was seen after turn {connection.turn}", event
            )
        connection.turn = max(turn, connection.turn)
        connection.turns.append(turn)
        if connection.left is None:
            connection.claim = connection.turn
        if source is not None:
            known = self._turns.setdefault(turn, (source, event))
            if known[0] != source:
                text = f"two turns of the room have the number {turn}: {known[0]} and {source}"
                self.find("doubled", connection.name, text, known[1], event)

    def _token(self, connection: str, number: int, token: str, event: Event) -> None:
        """A frame with random bytes: those of one attempt, the same for all who see the turn."""
        known = self._tokens.setdefault((connection, number), (token, event))
        if known[0] != token:
            text = f"effects of two runs of message {number} of {connection} were seen"
            self.find("torn", event.connection, text, known[1], event)
        elif self._journaled and token not in self._attempts.get((connection, number), ()):
            text = f"no turn of message {number} of {connection} had sent that by then"
            self.find("early", event.connection, text, event)

    def _reply(self, connection: _Connection, event: Event) -> None:
        kind, number, *rest = event.detail
        name = connection.name
        if not 1 <= number <= len(connection.sent):
            self.find("early", name, f"an answer to message {number}, which was not sent by then", event)
            return
        sent = connection.sent[number - 1]
        if sent.detail[0] != kind:
            self.find("torn", name, f"message {number} was answered as another kind", sent, event)
            return
        if number in connection.answered:
            self.find("doubled", name, f"message {number} was answered again", sent, event)
            return
        connection.answered.add(number)
        self.report.counts["answers"] += 1
        if number < connection.next:
            passed = connection.skipped.pop(number)
            self.find("reordered", name, f"message {number} was answered after later ones", passed, event)
        else:
            for missing in range(connection.next, number):
                connection.skipped[missing] = event
            connection.next = number + 1
        if kind in DURABLE:
            self._counted(connection, number, event)
        elif kind == "s":
            surplus = rest[0] - connection.state_index[number]
            if surplus != connection.state_surplus:
                word = "doubled" if surplus > connection.state_surplus else "lost"
                text = f"message {number}: the state is {rest[0]} instead of "
                text += str(connection.state_index[number] + connection.state_surplus)
                self.find(word, name, text, sent, event)
                connection.state_surplus = surplus
        else:
            self._token(name, number, rest[0], event)
            if kind != "p" and not rest[-1]:
                self.find("torn", name, f"the answer to message {number} is damaged", event)

    def _counted(self, connection: _Connection, number: int, event: Event) -> None:
        kind, _, turn, count, last, *rest = event.detail
        name = connection.name
        self._turn(connection, turn, (name, number), event)
        connection.marks.append((number, turn))
        index = connection.durable_index[number]
        surplus = count - index
        if surplus != connection.surplus:
            word = "doubled" if surplus > connection.surplus else "lost"
            text = f"message {number}: {count} turns were counted instead of {index + connection.surplus}"
            self.find(word, name, text, connection.sent[number - 1], event)
            connection.surplus = surplus
        elif last != (connection.durable[index - 2] if index > 1 else 0):
            text = f"message {number}: the turn before was that of message {last}"
            self.find("reordered", name, text, connection.sent[number - 1], event)
        connection.count = max(connection.count, count)
        if kind == "t":
            connection.tags.append((turn, frozenset(rest[0])))
        elif kind == "b":
            self._token(name, number, rest[0], event)
            self._broadcasts[turn] = (name, number, connection.sent[number - 1].detail[1])

    def _durable_broadcast(self, connection: _Connection, event: Event) -> None:
        _, turn, origin, number, tag, token = event.detail
        self.report.counts["deliveries"] += 1
        self._broadcasts.setdefault(turn, (origin, number, tag))
        if turn in connection.broadcasts:
            text = f"the broadcast of turn {turn} came again"
            self.find("broadcast doubled", connection.name, text, connection.broadcasts[turn], event)
            return
        connection.broadcasts[turn] = event
        self._turn(connection, turn, (origin, number), event)
        self._token(origin, number, token, event)

    def _plain_broadcast(self, connection: _Connection, event: Event) -> None:
        _, origin, number, tag, token = event.detail
        self.report.counts["deliveries"] += 1
        self._plain.setdefault((origin, number), tag)
        if (origin, number) in connection.plain:
            text = f"the broadcast of message {number} of {origin} came again"
            first, _ = connection.plain[origin, number]
            self.find("broadcast doubled", connection.name, text, first, event)
            return
        connection.plain[origin, number] = (event, len(connection.turns))
        self._token(origin, number, token, event)

    # --- At the end -------------------------------------------------------------------------------

    def finish(self, *, finished: bool) -> Report:
        """All events have been taken; `finished`: the run came to its end in order."""
        for connection in self._connections.values():
            for number, event in connection.skipped.items():
                text = f"message {number} was never answered, a later one was"
                self.find("lost", connection.name, text, connection.sent[number - 1], event)
            if finished and connection.opened and connection.left is None and connection.ended is None:
                self._unanswered(connection)
            if connection.silence.seconds:
                self.report.silences.append(connection.silence)
        if self._truth is not None:
            self._compare_with_truth(self._truth, finished=finished)
        self._broadcasts_of_turns()
        self._broadcasts_without()
        return self.report

    def _unanswered(self, connection: _Connection) -> None:
        for number in range(connection.next, len(connection.sent) + 1):
            text = f"message {number} was never answered"
            self.find("lost", connection.name, text, connection.sent[number - 1])

    def _broadcasts_of_turns(self) -> None:
        """Who had the tag in the broadcast's turn has got it, once; nobody else has."""
        turns = sorted(self._broadcasts)
        self.report.counts["broadcasts"] += len(turns) + len(self._plain)
        for connection in self._connections.values():
            if connection.hello is None:
                continue
            first = bisect_right(turns, connection.hello.detail[1])
            last = bisect_right(turns, connection.claim)
            for turn in turns[first:last]:
                origin, number, tag = self._broadcasts[turn]
                wanted = tag in connection.tags_at(turn)
                came = connection.broadcasts.get(turn)
                if wanted and came is None:
                    text = (
                        f"the broadcast of turn {turn} to {tag!r} (message {number} of {origin}) never came"
                    )
                    self.find("broadcast missing", connection.name, text, self._sent_as(origin, number))
                elif came is not None and not wanted:
                    text = f"the broadcast of turn {turn} to {tag!r} came without the tag"
                    self.find("broadcast astray", connection.name, text, came)

    def _broadcasts_without(self) -> None:
        """The same for turns that write nothing, whose place is known from the sender's turns around it."""
        for (origin, number), tag in self._plain_turns():
            sender = self._connections[origin]
            place = bisect_left(sender.marks, number, key=lambda mark: mark[0])
            low = sender.marks[place - 1][1] if place else 0
            high = sender.marks[place][1] if place < len(sender.marks) else None
            for connection in self._connections.values():
                came = connection.plain.get((origin, number))
                if came is not None:
                    self._in_place(connection, came, low, high, f"message {number} of {origin}")
                elif high is not None and connection.hello is not None and connection.claim >= high:
                    # A connect turn that wrote nothing only says after which turn it was.
                    _, since, wrote, _ = connection.hello.detail
                    if (since < low or (wrote and since == low)) and connection.constant(tag, low, high):
                        text = f"the broadcast of message {number} of {origin} to {tag!r} never came"
                        self.find("broadcast missing", connection.name, text, self._sent_as(origin, number))

    def _plain_turns(self) -> Iterator[tuple[tuple[str, int], str]]:
        seen = dict(self._plain)
        for connection in self._connections.values():
            for number in connection.answered:
                detail = connection.sent[number - 1].detail
                if detail[0] == "p":
                    seen.setdefault((connection.name, number), detail[1])
        return iter([(key, tag) for key, tag in seen.items() if key[0] in self._connections])

    def _in_place(
        self, connection: _Connection, came: tuple[Event, int], low: int, high: int | None, what: str
    ) -> None:
        event, place = came
        before = max(connection.turns[:place], default=0)
        after = connection.turns[place] if place < len(connection.turns) else None
        if (high is not None and before >= high) or (after is not None and after <= low):
            text = f"the broadcast of {what}, made between turns {low} and {high}, came after {before}"
            self.find("reordered", connection.name, f"{text} and before {after}", event)

    def _sent_as(self, origin: str, number: int) -> Event | None:
        connection = self._connections.get(origin)
        return connection.sent[number - 1] if connection and number <= len(connection.sent) else None

    def _compare_with_truth(self, truth: Event, *, finished: bool) -> None:
        told = truth.detail
        self.report.counts["rooms"] += 1
        highest = max((connection.turn for connection in self._connections.values()), default=0)
        if told["T"] < highest:
            text = f"turn {highest} was seen, and {told['T']} is the last that is stored"
            self.find("early", "", text, truth)
        sources: dict[tuple[str, int], str] = {}
        for turn, (origin, number, tag, _) in told["b"].items():
            self._broadcasts.setdefault(int(turn), (origin, number, tag))
            other = sources.setdefault((origin, number), turn)
            if other != turn:
                text = f"the turn of message {number} was committed as {int(other)} and as {int(turn)}"
                self.find("doubled", origin, text, self._sent_as(origin, number))
        for turn, ((origin, number), event) in self._turns.items():
            if event.detail[0] in "bB" and f"{turn:09}" not in told["b"]:
                text = f"the broadcast of turn {turn} was seen and is not stored"
                self.find("early", origin, text, self._sent_as(origin, number), event)
        for connection in self._connections.values():
            self._compare_connection(connection, told, finished=finished)

    def _compare_connection(self, connection: _Connection, told: dict[str, Any], *, finished: bool) -> None:
        name = connection.name
        times, _ = told["k"].get(name, (0, 0))
        closes = told["x"].get(name, [])
        count, last = told["c"].get(name, (0, 0))
        hello = connection.hello
        if times > 1 and not (hello is not None and hello.detail[2] > 1):
            self.find("doubled", name, f"its connect turn was committed {times} times", hello)
        if hello is not None and times < hello.detail[2]:
            self.find("early", name, "its connect turn was seen and is not stored", hello)
        self.report.counts["closes"] += len(closes)
        if len(closes) > 1:
            self.find("close doubled", name, f"on_close ran {len(closes)} times: {closes}", connection.left)
        elif finished and not closes and (connection.opened or times):
            self.find("close missing", name, "on_close never ran", connection.left, connection.ended)
        if closes and (closes[-1][3], closes[-1][4]) != (count, last):
            self.find("reordered", name, f"a turn ran after on_close: {closes[-1]}, then {count}, {last}")
        self._compare_count(connection, count, last, finished=finished)

    def _compare_count(self, connection: _Connection, count: int, last: int, *, finished: bool) -> None:
        name, expected = connection.name, len(connection.durable) + connection.surplus
        if count < connection.count:
            text = f"{connection.count} turns were seen, {count} are stored"
            self.find("early", name, text)
        elif count > expected:
            self.find("doubled", name, f"{count} turns are stored, {expected} messages were sent")
        elif finished and connection.orderly and connection.opened and count < expected:
            number = connection.durable[count - connection.surplus]
            text = f"message {number} was never handled: {count} turns are stored instead of {expected}"
            self.find("lost", name, text, connection.sent[number - 1], connection.left)
        else:
            index = count - connection.surplus
            expected_last = connection.durable[index - 1] if 0 < index <= len(connection.durable) else last
            if last != expected_last:
                text = f"{count} turns are stored, the last of message {last}, not {expected_last}"
                self.find("reordered", name, text)


def split(events: Iterable[Event]) -> tuple[dict[str, list[Event]], list[Event], bool]:
    """Sort a history by rooms; beside it the kills and whether the run came to its end."""
    rooms: dict[str, list[Event]] = defaultdict(list)
    kills: list[Event] = []
    finished = False
    for event in events:
        if event.who == "killer":
            kills.append(event)
        elif event.event == "finish":
            finished = True
        else:
            rooms[event.room].append(event)
    return rooms, kills, finished


def check_room(
    name: str, events: Iterable[Event], kills: list[Event] | None = None, *, finished: bool = True
) -> Report:
    """Check the events of one room, in order."""
    room = _Room(name, kills or [])
    for event in events:
        room.take(event)
    return room.finish(finished=finished)


def check(events: Iterable[Event]) -> Report:
    """Check a whole history, whose events are in the order of their time."""
    rooms, kills, finished = split(events)
    report = Report()
    if not finished:
        text = "the clients did not come to their end: what is missing below may have been under way"
        report.findings.append(Finding("unfinished", "", "", text))
    for name in sorted(rooms):
        report.merge(check_room(name, rooms[name], kills, finished=finished))
    return report
