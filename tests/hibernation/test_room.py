"""What room code holds in its hands: what a turn stages, what a failed one leaves, what storage shows."""

import contextvars
import enum
from datetime import UTC, datetime
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from hibernation import wire
from hibernation.connection import Connection
from hibernation.errors import ConnectionClosedError, LimitExceeded, RoomGone
from hibernation.link import encode as encode_for_link
from hibernation.room import Room
from hibernation.settings import Settings
from hibernation.staging import Turn
from storage.alarms import AlarmRow
from storage.errors import StorageLimitError, ValueEncodingError
from storage.values import decode, encode


class Mixed(str, enum.Enum):  # noqa: UP042 - whose str() is not its text
    A = "value"


class FakeHost:
    """A backstage without a gateway and without a disk."""

    def __init__(self) -> None:
        self.disk: dict[str, bytes] = {}
        self.alarms: dict[str, AlarmRow] = {}
        self.rows: list[list[Any]] = []
        self.asked: list[tuple[str, Any]] = []
        self.answered: dict[tuple[int, int], int] = {}
        self.own_databases: set[str] = set()
        self.questions = 0

    def read(self, key: str, name: str) -> bytes | None:
        return self.disk.get(name)

    def read_range(self, key: str, **bounds: Any) -> list[tuple[str, bytes]]:
        found = [(name, self.disk[name]) for name in select(self.disk, **{**bounds, "limit": None})]
        return found[: bounds["limit"]]

    async def database_to_clear(self, key: str, turn: Turn) -> None:
        """There are no tables."""

    def check_alarms(self, key: str) -> None:
        assert key == "chat/lobby"

    def read_alarm(self, key: str, name: str) -> AlarmRow | None:
        return self.alarms.get(name)

    def read_alarms(self, key: str) -> dict[str, AlarmRow]:
        return dict(self.alarms)

    def count_alarms(self, key: str) -> int:
        return len(self.alarms)

    async def flush(self, turn: Turn) -> None:
        raise AssertionError

    @property
    def switchboard(self) -> Any:
        raise AssertionError("no other room is concerned")

    def read_many(self, key: str, names: Any) -> dict[str, bytes]:
        self.questions += 1
        return {name: self.disk[name] for name in names if name in self.disk}

    def open_database(self, key: str) -> None:
        raise AssertionError("no room has one")

    async def own_database(self, key: str, turn: Turn) -> Any:
        raise AssertionError("no room has one")

    async def ask_gateway(self, key: str, what: str, argument: Any) -> Any:
        self.asked.append((what, argument))
        encode_for_link([argument])  # what cannot be sent would end the host
        await trio.lowlevel.checkpoint()
        if what == "find":
            return next((row for row in self.rows if wire.read_card(row[2])[0] == argument), None)
        if what == "list":
            return [self.rows[:1], b"rest" if self.rows[1:] else b""]
        if what == "more":
            return [self.rows[1:], b""]
        if what == "answered":
            return self.answered.get(tuple(argument))
        return len(self.rows)


def select(
    names: Any,
    *,
    start: str | None = None,
    start_after: str | None = None,
    end: str | None = None,
    prefix: str | None = None,
    reverse: bool = False,
    limit: int | None = None,
) -> list[str]:
    """The model of `list`: names that count, in byte order."""
    found = [
        name
        for name in sorted(names, key=str.encode, reverse=reverse)
        if (start is None or name.encode() >= start.encode())
        and (start_after is None or name.encode() > start_after.encode())
        and (end is None or name.encode() < end.encode())
        and name.startswith(prefix or "")
    ]
    return found if limit is None else found[:limit]


class Stage:
    """A room with its fake host, and the steps that the real host takes."""

    def __init__(self, **settings: Any) -> None:
        self.host = FakeHost()
        self.pending: dict[str, bytes | None] = {}
        self.connections: dict[int, Connection] = {}
        self.room = Room(
            self.host,
            "chat/lobby",
            Settings(**settings),
            {"NAME": "value"},
            self.connections,
            self.pending,
        )

    def begin(self) -> list[Any]:
        self.turn = self.room._begin()
        return self.turn.effects

    def end(self) -> list[Connection]:
        """End a turn well: its writes are pending, its edits on their way. Gives the edited connections."""
        turn = self.turn
        turn.room = None
        if turn.cleared:
            self.pending.clear()
            self.room._pending_cleared = True
        self.pending.update(turn.writes or {})
        for connection, edit in (turn.edits or {}).items():
            connection._apply(edit)
        return list(turn.edits or {})

    def commit(self) -> None:
        """The disk has it."""
        if self.room._pending_cleared:
            self.host.disk.clear()
        for name, blob in self.pending.items():
            if blob is None:
                self.host.disk.pop(name, None)
            else:
                self.host.disk[name] = blob
        self.pending.clear()
        self.room._pending_cleared = False

    def connect(self, number: int, *tags: str, state: Any = None) -> Connection:
        card = wire.make_card(f"c{number}", f"ws://h/{number}", wire.tags_blob(tags))
        blob = None if state is None else encode(state)
        self.host.rows.append([number, number, card, blob])
        connection = self.connections[number] = Connection(self.room, number, number, card, blob)
        return connection

    def ids(self, **filters: Any) -> list[str]:
        async def collect() -> list[str]:
            return [each.id async for each in self.room.get_connections(**filters)]

        return trio.run(collect)

    def count(self, **filters: Any) -> int:
        async def count() -> int:
            return await self.room.count_connections(**filters)

        return trio.run(count)

    def find(self, connection_id: str) -> Connection | None:
        return trio.run(self.room.get_connection, connection_id)

    def get(self, *arguments: Any) -> Any:
        return trio.run(self.room.storage.get, *arguments)

    def list(self, **bounds: Any) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            return await self.room.storage.list(**bounds)

        return trio.run(ask)


@pytest.fixture
def stage() -> Stage:
    return Stage()


# --- Effects --------------------------------------------------------------------------------------


def test_automatic_responses_are_effects_like_others(stage):
    """S16, S20: staged in their place, counted, and nothing is staged of one that cannot be."""
    connection = stage.connect(7)
    effects = stage.begin()
    connection.send("before")
    stage.room.set_auto_response("ping", "pong")
    stage.room.set_auto_response(bytearray(b"a"), b"b", prefix=True)
    stage.room.set_auto_response("ping", None)
    connection.send("after")
    wanted = [
        [wire.SEND, 7, 7, "before"],
        [wire.AUTO, "chat/lobby", "ping", "pong", False, 16],
        [wire.AUTO, "chat/lobby", b"a", b"b", True, 16],
        [wire.AUTO, "chat/lobby", "ping", None, False, 16],
        [wire.SEND, 7, 7, "after"],
    ]
    assert effects == wanted
    for arguments, error in [
        (("x" * 2049, "y"), LimitExceeded),
        (("x", "y" * 2049), LimitExceeded),
        ((7, "y"), TypeError),
        (("x", 7), TypeError),
    ]:
        with pytest.raises(error):
            stage.room.set_auto_response(*arguments)
    with pytest.raises(ValueError, match="empty prefix"):
        stage.room.set_auto_response("", "y", prefix=True)
    assert effects == wanted
    stage.room.set_auto_response("x" * 2048, "y" * 2048)
    encode_for_link(effects)
    stage.end()
    with pytest.raises(RoomGone):
        stage.room.set_auto_response("ping", "pong")


def test_automatic_responses_of_one_turn_are_bounded(stage):
    """S16: at the limit; one more is an error, and nothing is staged of it."""
    effects = stage.begin()
    for number in range(16):
        stage.room.set_auto_response(str(number), "x")
    stage.room.set_auto_response("0", "again")
    with pytest.raises(LimitExceeded, match="17 rules, and at most 16 are allowed; set fewer, or raise"):
        stage.room.set_auto_response("16", "x")
    assert len(effects) == 17
    stage.room.set_auto_response("0", None)
    stage.room.set_auto_response("16", "x")
    with pytest.raises(LimitExceeded):
        stage.room.set_auto_response(b"16", "x")
    stage.room.set_auto_response("never set", None)


def test_automatic_responses_count_as_staged(stage):
    stage.begin()
    for _ in range(stage.room._bytes_max // 4096):
        stage.room.set_auto_response("x" * 2048, "x" * 2048)
    with pytest.raises(LimitExceeded, match="store less in one turn"):
        stage.room.set_auto_response("x", "")


def test_the_time_of_the_last_automatic_response_is_asked_for(stage):
    connection = stage.connect(7)
    assert trio.run(connection.auto_response_at) is None
    stage.host.answered[7, 7] = 1_700_000_000_123
    at = trio.run(connection.auto_response_at)
    assert at == datetime(2023, 11, 14, 22, 13, 20, 123_000, UTC)
    assert stage.host.asked[-1] == ("answered", [7, 7])


def test_effects_are_staged_in_the_order_of_the_calls(stage):
    """S20: send, broadcast and close keep their order."""
    connection = stage.connect(7)
    effects = stage.begin()
    connection.send("one")
    stage.room.broadcast(b"two", without=[connection, "other"], tag="t", none_of=["n"])
    connection.send({"three": "é"})
    connection.close(4000, "bye")
    assert effects == [
        [wire.SEND, 7, 7, "one"],
        [wire.BROADCAST, "chat/lobby", b"two", ["c7", "other"], ["t"], [], ["n"]],
        [wire.SEND, 7, 7, '{"three":"é"}'],
        [wire.SHUT, 7, 7, 4000, "bye"],
    ]


@pytest.mark.parametrize(
    ("message", "frame"),
    [
        ("text", "text"),
        ("", ""),
        (b"bytes", b"bytes"),
        (bytearray(b"array"), b"array"),
        (memoryview(b"view"), b"view"),
        ([1, None, "é"], '[1,null,"é"]'),
        (None, "null"),
        (5, "5"),
        (Mixed.A, "value"),
    ],
)
def test_text_and_bytes_go_as_they_are_and_the_rest_as_json(stage, message, frame):
    """S18."""
    connection = stage.connect(1)
    effects = stage.begin()
    connection.send(message)
    stage.room.broadcast(message)
    assert effects[0][3] == frame
    assert effects[1][2] == frame
    assert type(effects[0][3]) is type(frame)


@pytest.mark.parametrize("message", ["\ud800", {"a": "\udfff"}, object(), {1, 2}])
def test_what_no_frame_can_hold_is_told_at_the_call(stage, message):
    """S18: nothing of it is staged."""
    connection = stage.connect(1)
    effects = stage.begin()
    for call in (connection.send, stage.room.broadcast):
        with pytest.raises((ValueError, TypeError)):
            call(message)
    assert effects == []


@pytest.mark.parametrize(
    "call",
    [
        lambda room, connection: room.broadcast("x", tag="\ud800"),
        lambda room, connection: room.broadcast("x", all_of=["\ud800"]),
        lambda room, connection: room.broadcast("x", without=["\ud800"]),
        lambda room, connection: room.broadcast("x", without=[5]),
        lambda room, connection: room.broadcast("x", without=[None]),
        lambda room, connection: room.broadcast("x", any_of=[b"bytes"]),
        lambda room, connection: connection.close(1000, "\ud800"),
        lambda room, connection: connection.close(1000, b"bytes"),
        lambda room, connection: connection.close(1000.0),
        lambda room, connection: connection.close("1000"),
        lambda room, connection: connection.close(True),
        lambda room, connection: connection.add_tags("\ud800"),
        lambda room, connection: connection.add_tags(""),
        lambda room, connection: connection.add_tags(5),
    ],
)
def test_what_would_break_the_link_or_the_gateway_is_refused_at_the_call(stage, call):
    """FAULTS: room code may pass anything; it is told, and no other room notices."""
    connection = stage.connect(1)
    effects = stage.begin()
    with pytest.raises((ValueError, TypeError)):
        call(stage.room, connection)
    assert effects == []
    assert not connection._edits


@pytest.mark.parametrize("connection_id", [5, None, b"c1", "\ud800"])
def test_an_id_that_is_no_text_is_refused_before_it_is_asked_for(stage, connection_id):
    """S12."""
    with pytest.raises((ValueError, TypeError)):
        stage.find(connection_id)
    assert stage.host.asked == []


def test_whatever_is_staged_can_be_sent_over_the_link(stage):
    """Subclasses of str and int, as enumerations are, become plain values."""
    connection = stage.connect(1)
    effects = stage.begin()

    class Code(enum.IntEnum):
        BYE = 4001

    connection.add_tags(Mixed.A)
    stage.room.broadcast(Mixed.A, tag=Mixed.A, without=[Mixed.A])
    connection.close(Code.BYE, Mixed.A)
    encode_for_link(effects)
    assert [type(part) for part in effects[-1]] == [int, int, int, int, str]
    assert effects[1][2:5] == ["value", ["value"], ["value"]]
    assert connection.tags == ("value",)


@pytest.mark.parametrize("code", [999, 1004, 1005, 1006, 1015, 1016, 2999, 5000, 0, -1])
def test_codes_that_may_not_be_sent_are_refused(stage, code):
    """S14, RFC 6455 section 7.4."""
    connection = stage.connect(1)
    stage.begin()
    with pytest.raises(ValueError):
        connection.close(code)
    connection.send("still open")


def test_a_close_reason_of_123_bytes_is_allowed_and_one_more_is_not(stage):
    """S14: counted in bytes of UTF-8."""
    connection = stage.connect(1)
    effects = stage.begin()
    with pytest.raises(ValueError):
        connection.close(1000, "é" * 62)
    connection.close(1000, "é" * 61 + "e")
    assert len(effects) == 1


def test_send_after_close_raises_and_a_second_close_does_nothing(stage):
    """S18: in the same turn and in the next."""
    connection = stage.connect(1)
    effects = stage.begin()
    connection.close()
    connection.close(4000)
    with pytest.raises(ConnectionClosedError):
        connection.send("late")
    assert len(effects) == 1
    stage.end()
    stage.begin()
    with pytest.raises(ConnectionClosedError):
        connection.send("later")


def test_effects_outside_of_a_turn_raise(stage):
    """S8: what outlives a turn is told so."""
    connection = stage.connect(1)
    room = stage.room
    for call in (
        lambda: connection.send("x"),
        lambda: room.broadcast("x"),
        lambda: connection.close(),
        lambda: connection.set_state(1),
        lambda: connection.add_tags("t"),
        lambda: room.storage.put("k", 1),
        lambda: room.storage.delete("k"),
        lambda: room.storage.delete_all(),
        room.hibernate,
        lambda: room.start_soon(print),
        lambda: trio.run(room.flush),
    ):
        with pytest.raises(RoomGone):
            call()


def test_what_outlives_a_turn_does_not_stage_into_the_next_one(stage):
    """S20: a task of an earlier turn meets the room while another turn of it is under way."""
    connection = stage.connect(1)
    stage.begin()
    earlier = contextvars.copy_context()
    stage.end()
    stage.begin()
    with pytest.raises(RoomGone):
        earlier.run(connection.send, "stray")
    with pytest.raises(RoomGone):
        earlier.run(stage.room.storage.put, "stray", 1)
    assert stage.turn.effects == []


# --- What a turn may stage ------------------------------------------------------------------------

LIMIT = 4096


@pytest.mark.parametrize(
    "stage_bytes",
    [
        pytest.param(lambda room, connection, size: connection.send("x" * size), id="send"),
        pytest.param(lambda room, connection, size: connection.send(b"x" * size), id="send bytes"),
        pytest.param(
            lambda room, connection, size: connection.send("é" * (size // 2) + "e" * (size % 2)),
            id="send utf-8",
        ),
        pytest.param(lambda room, connection, size: room.broadcast("x" * size), id="broadcast"),
        pytest.param(
            lambda room, connection, size: room.broadcast("é" * (size // 2) + "e" * (size % 2)),
            id="broadcast utf-8",
        ),
        # Two bytes for the key, three for the head of the value.
        pytest.param(lambda room, connection, size: room.storage.put("kk", b"x" * (size - 5)), id="put"),
        pytest.param(
            lambda room, connection, size: room.storage.put({"kk": b"x" * (size - 5)}), id="put many"
        ),
        pytest.param(lambda room, connection, size: connection.set_state(b"x" * (size - 3)), id="state"),
    ],
)
def test_a_turn_stages_turn_bytes_max_and_not_one_byte_more(stage_bytes):
    """S20: at one below, at, and one above; what is refused leaves nothing and takes no room."""
    for size in (LIMIT - 1, LIMIT):
        stage = Stage(turn_bytes_max=LIMIT)
        connection = stage.connect(1)
        stage.begin()
        stage_bytes(stage.room, connection, size)
        assert stage.turn.bytes == size
    stage = Stage(turn_bytes_max=LIMIT)
    connection = stage.connect(1, state="old")
    effects = stage.begin()
    with pytest.raises(LimitExceeded):
        stage_bytes(stage.room, connection, LIMIT + 1)
    assert effects == []
    assert connection.state == "old"
    assert not stage.turn.writes
    assert not connection._edits
    stage_bytes(stage.room, connection, LIMIT)
    stage.end()
    stage.begin()
    stage_bytes(stage.room, connection, LIMIT)


def test_tags_that_do_not_fit_into_the_turn_change_nothing():
    """S11, S20."""
    stage = Stage(turn_bytes_max=LIMIT)
    connection = stage.connect(1, "old")
    effects = stage.begin()
    connection.send("x" * (LIMIT - 3))
    with pytest.raises(LimitExceeded):
        connection.add_tags("new")
    assert connection.tags == ("old",)
    assert len(effects) == 1


# --- Tags -----------------------------------------------------------------------------------------


def test_tags_keep_their_order_and_fold_repetitions_before_they_are_counted():
    """S11."""
    stage = Stage(tags_max=3, tag_bytes_max=4)
    connection = stage.connect(1, "a")
    effects = stage.begin()
    connection.add_tags("b", "a", "b", "c")
    assert connection.tags == ("a", "b", "c")
    with pytest.raises(LimitExceeded):
        connection.add_tags("d")
    with pytest.raises(LimitExceeded):
        connection.add_tags("é" * 2 + "e")
    connection.remove_tags("b", "nothing")
    connection.add_tags("é" * 2)
    assert connection.tags == ("a", "c", "éé")
    connection.add_tags("a")
    assert len(effects) == 3


# --- State ----------------------------------------------------------------------------------------


def test_state_is_set_by_value_and_by_function_of_the_latest(stage):
    """S13."""
    connection = stage.connect(1, state={"n": 1})
    effects = stage.begin()
    connection.set_state(lambda state: {"n": state["n"] + 1})
    connection.set_state(lambda state: {"n": state["n"] + 1})
    assert connection.state == {"n": 3}
    assert decode(effects[-1][3]) == {"n": 3}
    connection.set_state(None)
    assert connection.state is None
    assert effects[-1][3] is None


def test_a_value_changed_in_place_is_not_the_state(stage):
    """S13: only `set_state` changes it."""
    connection = stage.connect(1, state=[1])
    effects = stage.begin()
    value = [2]
    connection.set_state(value)
    value.append(3)
    assert connection.state == [2]
    assert decode(effects[0][3]) == [2]


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_state_has_its_limit(over):
    """S13, FAULTS 56: an error at the call, and the old value stays."""
    stage = Stage(state_bytes_max=100)
    connection = stage.connect(1, state="old")
    effects = stage.begin()
    value = b"x" * (100 - 2 + over)
    if over <= 0:
        connection.set_state(value)
        assert connection.state == value
    else:
        with pytest.raises(StorageLimitError):
            connection.set_state(value)
        assert (connection.state, effects) == ("old", [])


def test_a_state_that_cannot_be_stored_or_made_leaves_the_old_one(stage):
    """S13, FAULTS 56."""
    connection = stage.connect(1, state="old")
    effects = stage.begin()
    with pytest.raises(ValueEncodingError):
        connection.set_state(object())
    with pytest.raises(ZeroDivisionError):
        connection.set_state(lambda _: 1 / 0)
    assert (connection.state, effects, connection._edits) == ("old", [], 0)


# --- Background work and parts of turns -----------------------------------------------------------


@pytest.mark.parametrize("running", [0, 2])
def test_a_room_has_background_max_pieces_of_work_and_not_one_more(running):
    """S7: at one below, at, and one above, those that run counted; what is refused changes nothing."""
    stage = Stage(background_max=4)
    stage.room._tasks = running
    stage.begin()
    for number in range(4 - running):
        stage.room.start_soon(print, number)
    with pytest.raises(
        LimitExceeded, match=r"at most 4 are allowed; let some of it end, or raise background_max"
    ):
        stage.room.start_soon(print)
    assert stage.turn.tasks == [(print, (number,)) for number in range(4 - running)]
    stage.room._discard()
    stage.begin()
    assert not stage.turn.tasks


def test_what_cannot_be_called_is_no_work(stage):
    stage.begin()
    with pytest.raises(TypeError, match="cannot be called"):
        stage.room.start_soon(None)


def test_a_part_of_a_turn_takes_all_that_was_staged_and_leaves_it_empty(stage):
    """S20: what is staged after it is another part, of the same turn, with all its room."""
    connection = stage.connect(1, state=1)
    stage.begin()
    assert not stage.turn.used
    connection.send("one")
    connection.set_state(2)
    stage.room.storage.put("k", 1)
    stage.room.hibernate()
    stage.room.start_soon(print)
    part = stage.turn.split()
    assert part.used and part.stored and part.evict and part.tasks
    assert [effect[0] for effect in part.effects] == [wire.SEND, wire.STATE]
    assert part.bytes > 0
    turn = stage.turn
    assert (turn.used, turn.bytes, turn.effects, turn.writes) == (False, 0, [], None)
    assert (part.room, turn.room) == (stage.room, stage.room)
    connection.send("two")
    assert [effect[3] for effect in turn.effects] == ["two"]


def test_turns_that_overlap_see_their_own_and_what_has_ended(stage):
    """S19, S20: writes, states, tags and closes of one show to others at its end; the last to end wins."""
    one, two = stage.connect(1, "tag", state="old"), stage.connect(2)
    contexts = [contextvars.copy_context() for _ in range(2)]
    turns = [context.run(stage.room._begin) for context in contexts]

    def in_turn(index: int, call: Any, *arguments: Any) -> Any:
        return contexts[index].run(call, *arguments)

    for index, value in enumerate(("first", "second")):
        in_turn(index, one.set_state, value)
        in_turn(index, one.add_tags, value)
        in_turn(index, stage.room.storage.put, "k", value)
    in_turn(0, two.close)
    assert [in_turn(index, lambda: one.state) for index in range(2)] == ["first", "second"]
    assert [in_turn(index, lambda: one.tags[-1]) for index in range(2)] == ["first", "second"]
    assert [in_turn(index, stage.get, "k") for index in range(2)] == ["first", "second"]
    assert (one.state, one.tags, stage.get("k")) == ("old", ("tag",), None)
    assert [in_turn(index, stage.ids) for index in range(2)] == [["c1"], ["c1", "c2"]]
    in_turn(1, two.send, "open")
    stage.turn = turns[1]
    stage.end()
    assert (one.state, one.tags, stage.get("k")) == ("second", ("tag", "second"), "second")
    assert in_turn(0, lambda: one.state) == "first"
    with pytest.raises(RoomGone):
        in_turn(1, one.send, "late")
    stage.turn = turns[0]
    stage.end()
    assert (one.state, stage.get("k"), stage.ids()) == ("first", "first", ["c1"])


# --- A turn that fails ----------------------------------------------------------------------------


def test_a_failed_turn_leaves_nothing(stage):
    """S20: puts, state, tags, closes are as before it."""
    stage.host.disk["k"] = encode("disk")
    connection, other = stage.connect(1, "tag", state=1), stage.connect(2)
    stage.begin()
    connection.set_state(2)
    connection.set_state(3)
    connection.add_tags("more")
    connection.close()
    other.close()
    stage.room.storage.put("k", "staged")
    stage.room.storage.delete_all()
    stage.room.storage.put("l", "staged")
    stage.room.hibernate()
    stage.room._discard()
    assert (connection.state, connection.tags, connection._closed, connection._edits) == (
        1,
        ("tag",),
        False,
        0,
    )
    effects = stage.begin()
    assert stage.get(["k", "l"]) == {"k": "disk"}
    assert not stage.turn.evict
    connection.send("open")
    other.send("open")
    assert len(effects) == 2
    assert stage.end() == []


def test_a_failed_turn_takes_nothing_from_the_turns_before_it(stage):
    """S20: what earlier turns staged stays, and stays newer than what the gateway says."""
    connection = stage.connect(1, state=1)
    old_row = stage.host.rows[0]
    stage.begin()
    connection.set_state(2)
    stage.room.storage.put("k", 2)
    assert stage.end() == [connection]
    stage.begin()
    connection.set_state(3)
    stage.room.storage.put("k", 3)
    stage.room._discard()
    stage.begin()
    stage.room._known(old_row)
    assert connection.state == 2
    assert stage.get("k") == 2


def test_an_acknowledgement_in_the_middle_of_a_turn_does_not_hide_what_the_turn_stages(stage):
    """S13: the staged value is the latest until the gateway has acknowledged it, however turns overlap with
    acknowledgements.
    """
    connection = stage.connect(1, state=1)
    stage.begin()
    connection.set_state(2)
    (edited,) = stage.end()
    stage.begin()
    connection.set_state(3)
    edited._edits -= 1  # the gateway acknowledges the first turn
    stage.room._known([1, 1, connection._card, encode(2)])
    assert connection.state == 3
    stage.room._discard()
    assert connection._edits == 0
    stage.room._known([1, 1, connection._card, encode(2)])
    assert connection.state == 2


# --- Connections ----------------------------------------------------------------------------------


def test_connections_come_in_order_with_staged_values_over_those_of_the_gateway(stage):
    """S12: a turn sees its own and earlier staged tags and closes."""
    one, two, three = stage.connect(1, "a"), stage.connect(2, "b"), stage.connect(3, "a")
    assert stage.ids() == ["c1", "c2", "c3"]
    assert stage.count() == 3
    stage.begin()
    two.add_tags("a")
    one.close()
    stage.host.rows[1:2] = []  # the gateway's filter does not know the new tag
    assert stage.ids(tag="a") == ["c2", "c3"]
    assert stage.count(tag="a") == 2
    stage.end()
    stage.begin()
    three.remove_tags("a")
    assert stage.ids(tag="a") == ["c2"]
    stage.room._discard()
    assert stage.ids(tag="a") == ["c2", "c3"]


def test_one_connection_is_one_object(stage):
    """What a turn staged shows, however the connection was found."""
    connection = stage.connect(1)
    assert stage.find("c1") is connection
    assert stage.find("nobody") is None
    stage.begin()
    connection.close()
    assert stage.find("c1") is None


def test_the_successor_of_a_closed_connection_is_found_under_its_id(stage):
    """S10, S12: an id is free again when its connection has been closed."""
    connection = stage.connect(1)
    stage.begin()
    connection.close()
    stage.end()
    stage.host.rows[:] = [[9, 9, wire.make_card("c1", "ws://h/9", b""), None]]
    found = stage.find("c1")
    assert found is not None
    assert found.uri == "ws://h/9"


# --- Storage --------------------------------------------------------------------------------------


def test_writes_return_something_that_may_be_awaited(stage):
    """S27: and deletes tell what existed."""
    stage.host.disk["a"] = encode(1)
    stage.begin()
    storage = stage.room.storage

    async def write() -> list[Any]:
        return [
            await storage.put("b", 2),
            await storage.put({"c": 3, "d": 4}),
            await storage.delete("a"),
            await storage.delete("a"),
            await storage.delete(["b", "c", "b", "x"]),
            await storage.delete_all(),
            await storage.delete("d"),
        ]

    assert trio.run(write) == [None, None, True, False, 2, None, False]


def test_default_of_get_and_missing_keys(stage):
    """S27."""
    stage.begin()
    stage.room.storage.put("none", None)
    assert stage.get("x") is None
    assert stage.get("x", 5) == 5
    assert stage.get("none", 5) is None
    assert stage.get(["x", "none"]) == {"none": None}


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("letter", ["k", "é"])
def test_keys_have_their_limit(stage, over, letter):
    """S27: 2 KiB of UTF-8; reads refuse it as writes do."""
    key = letter * (2048 // len(letter.encode()) - 1) + "x" * (len(letter.encode()) + over)
    assert len(key.encode()) == 2048 + over
    stage.begin()
    storage = stage.room.storage
    calls: list[Any] = [
        lambda: storage.put(key, 1),
        lambda: storage.put({key: 1}),
        lambda: storage.delete(key),
    ]
    calls += [lambda: storage.delete([key]), lambda: stage.get(key)]
    for call in calls:
        if over <= 0:
            call()
        else:
            with pytest.raises(StorageLimitError):
                call()
    assert bool(stage.turn.writes) == (over <= 0)


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_values_have_their_limit(stage, over):
    """S27: 2 MiB of CBOR, and five of those bytes are its head."""
    stage.begin()
    value = b"x" * (2 * 1024 * 1024 - 5 + over)
    if over <= 0:
        stage.room.storage.put("k", value)
        assert stage.get("k") == value
    else:
        for call in (
            lambda: stage.room.storage.put("k", value),
            lambda: stage.room.storage.put({"small": 1, "k": value}),
        ):
            with pytest.raises((StorageLimitError, LimitExceeded)):
                call()
        assert not stage.turn.writes


@pytest.mark.parametrize("key", ["", "\ud800", 5, None, b"bytes"])
def test_what_is_no_key_is_refused(stage, key):
    """S27."""
    stage.begin()
    storage = stage.room.storage
    for call in (
        lambda: storage.put({key: 1}),
        lambda: storage.delete([key]),
        lambda: stage.get([key]),
    ):
        with pytest.raises((ValueError, TypeError, ValueEncodingError)):
            call()
    assert not stage.turn.writes


def test_put_of_many_is_all_or_nothing(stage):
    """S27."""
    stage.begin()
    with pytest.raises(ValueEncodingError):
        stage.room.storage.put({"a": 1, "b": object()})
    with pytest.raises(TypeError):
        stage.room.storage.put("a")
    assert stage.list() == {}


def test_list_refuses_bounds_that_contradict_each_other(stage):
    """S27."""
    for bounds in ({"start": "a", "start_after": "a"}, {"limit": -1}):
        with pytest.raises(ValueError):
            stage.list(**bounds)


keys = st.text(st.sampled_from("aAbé\U0001f600~0"), min_size=1, max_size=3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), keys, st.integers(0, 9)),
        st.tuples(st.just("delete"), keys),
        st.tuples(st.just("clear")),
        st.tuples(st.sampled_from(["end", "fail", "commit"])),
    ),
    max_size=25,
)
bounds = st.fixed_dictionaries(
    {},
    optional={
        "start": keys,
        "end": keys,
        "prefix": st.text(st.sampled_from("aAbé"), max_size=2),
        "reverse": st.booleans(),
        "limit": st.integers(0, 6),
    },
)


@given(steps=steps, bounds=bounds, after=st.none() | keys)
def test_storage_shows_what_a_plain_dict_would(steps, bounds, after):
    """S27, S19: own writes, those of earlier turns that are not on disk, and those that are, as one."""
    stage = Stage()
    storage = stage.room.storage
    kept: dict[str, int] = {}
    present: dict[str, int] = {}
    stage.begin()
    for step in steps:
        match step:
            case ("put", key, value):
                storage.put(key, value)
                present[key] = value
            case ("delete", key):
                existed = trio.run(_awaited, storage.delete(key))
                assert existed == (key in present)
                present.pop(key, None)
            case ("clear",):
                storage.delete_all()
                present.clear()
            case ("end",):
                stage.end()
                kept = dict(present)
                stage.begin()
            case ("fail",):
                stage.room._discard()
                present = dict(kept)
                stage.begin()
            case ("commit",):
                stage.commit()
    if after is not None:
        bounds = {name: value for name, value in bounds.items() if name != "start"} | {"start_after": after}
    found = stage.list(**bounds)
    assert list(found.items()) == [(name, present[name]) for name in select(present, **bounds)]
    assert stage.get(list(present)) == present


async def _awaited(done: Any) -> Any:
    return await done


# --- Facts ----------------------------------------------------------------------------------------


def test_a_room_knows_its_names(stage):
    """An id may hold a slash."""
    room = Room(stage.host, "chat/a/b", Settings(), {"A": "b"}, {}, {})
    assert (room.id, room.party, room.name, room.env) == ("a/b", "chat", "chat", {"A": "b"})


def test_many_keys_are_one_question_to_the_disk():
    """S27: those that this turn or an earlier one has written are none."""
    stage = Stage()
    stage.host.disk = {f"k{number}": encode(number) for number in range(300)}
    stage.pending.update(k1=encode("pending"), k2=None)
    stage.begin()
    storage = stage.room.storage
    storage.put("k0", "own")
    names = [f"k{number}" for number in range(300)]

    async def look() -> None:
        found = await storage.get([*names, "none", "k0"])
        assert list(found.items())[:3] == [("k0", "own"), ("k1", "pending"), ("k3", 3)]
        assert len(found) == 299
        assert stage.host.questions == 1
        assert await storage.delete([*names, "none", "k0"]) == 299
        assert await storage.get(names) == {}
        assert stage.host.questions == 2

    trio.run(look)
    wrong: Any = [1]

    async def look_for_a_number() -> None:
        with pytest.raises(TypeError, match="a storage key is a str"):
            await storage.get(wrong)

    trio.run(look_for_a_number)
