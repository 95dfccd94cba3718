"""Which automatic response a message gets, and the rules that rooms set for themselves (S16)."""

from typing import Any

import pytest
from cbor2 import loads

from broker.gateway.answers import Answers, RoomRules
from broker.gateway.connections import Connections
from broker.gateway.frames import encode_message
from broker.gateway.parties import PartyView
from broker.gateway.rooms import RoomRecord, Rooms
from hibernation.settings import Settings
from storage.errors import BrokerError


def party(**rules: str) -> PartyView:
    return PartyView.from_description(
        {
            "name": "main",
            "hooks": [],
            "cors": None,
            "settings": {},
            "hibernate": True,
            "subprotocols": [],
            "auto_responses": [[True, request, True, reply, False] for request, reply in rules.items()],
        },
        Settings(),
    )


def reply(answers: Answers | None, message: str | bytes) -> str | bytes | None:
    frame = None if answers is None else answers.match(message)
    if frame is None:
        return None
    return frame[2:].decode() if frame[0] == 0x81 else frame[2:]


def test_text_and_bytes_are_different_requests() -> None:
    answers = Answers([("ping", "pong", False), (b"\x09", b"\x0a", False), (b"mixed", "text", False)])
    assert reply(answers, "ping") == "pong"
    assert reply(answers, b"ping") is None
    assert reply(answers, b"\x09") == b"\x0a"
    assert reply(answers, "\x09") is None
    assert reply(answers, b"mixed") == "text"
    assert reply(answers, "ping ") is reply(answers, "pin") is reply(answers, "") is None


def test_a_whole_message_goes_before_a_prefix_and_a_longer_prefix_before_a_shorter_one() -> None:
    answers = Answers(
        [("a", "1", True), ("abc", "2", True), ("ab", "3", True), ("abcd", "4", False), (b"a", b"5", True)]
    )
    found = [reply(answers, text) for text in ("a", "ab!", "abc", "abcd", "abcde", "b", "")]
    assert found == ["1", "3", "2", "4", "2", None, None]
    assert reply(answers, b"abcd") == b"5"


def test_an_empty_message_can_be_answered() -> None:
    answers = Answers([("", "nothing", False)])
    assert reply(answers, "") == "nothing"
    assert reply(answers, b"") is None


def test_the_first_group_goes_before() -> None:
    answers = Answers(
        [("a", "room", False), ("p", "room", True)], [("a", "party", False), ("p", "party", True)]
    )
    assert reply(answers, "a") == reply(answers, "p!") == "room"


def test_replies_are_frames_made_once() -> None:
    answers = Answers([("a", "x" * 2048, False)])
    assert answers.match("a") == encode_message("x" * 2048)
    assert answers.match("a") is answers.match("a")


class Registry:
    """What `RoomRules` asks."""

    def __init__(self) -> None:
        self.rules: dict[str, bytes] = {}
        self.reads = 0
        self.broken = False

    def read(self, key: str) -> bytes | None:
        self.reads += 1
        if self.broken:
            raise BrokerError("broken")
        return self.rules.get(key)

    def store(self, rules: RoomRules) -> None:
        """The present changes are committed."""
        changes = dict(rules.unsaved)
        for key, blob in changes.items():
            if blob is None:
                self.rules.pop(key, None)
            else:
                self.rules[key] = blob
        rules.saved(changes)


@pytest.fixture
def registry() -> Registry:
    return Registry()


def change(
    rules: RoomRules, room: RoomRecord | None, request: str, answer: str | None, most: int = 16
) -> Any:
    blob = rules.change(room, "main/r", request, answer, prefix=False, most=most)
    return [] if blob is None else loads(blob)


def test_a_room_sets_replaces_and_takes_away(registry: Registry) -> None:
    rules = RoomRules(registry.read)
    rooms = Rooms(Connections(), rules=rules)
    room = rooms.record("main/r", party(ping="party", other="party"), 0)
    assert reply(room.answers, "ping") == "party"
    assert change(rules, room, "ping", "room") == [["ping", "room", False]]
    assert reply(room.answers, "ping") == "room"
    assert reply(room.answers, "other") == "party"
    assert change(rules, room, "x", "y") == [["ping", "room", False], ["x", "y", False]]
    assert change(rules, room, "ping", "again") == [["x", "y", False], ["ping", "again", False]]
    assert change(rules, room, "x", None) == [["ping", "again", False]]
    assert change(rules, room, "ping", None) == []
    assert reply(room.answers, "ping") == "party"
    assert change(rules, room, "never set", None) == []


def test_prefix_and_type_tell_rules_apart(registry: Registry) -> None:
    rules = RoomRules(registry.read)
    for request, prefix in (("a", False), ("a", True), (b"a", False), (b"a", True)):
        blob = rules.change(None, "main/r", request, "x", prefix=prefix, most=16)
    assert blob is not None
    assert len(loads(blob)) == 4
    blob = rules.change(None, "main/r", b"a", None, prefix=True, most=16)
    assert blob is not None
    assert loads(blob) == [["a", "x", False], ["a", "x", True], [b"a", "x", False]]


@pytest.mark.parametrize(("count", "first"), [(15, "0"), (16, "0"), (17, "1"), (18, "2")])
def test_beyond_the_limit_the_oldest_rule_goes(registry: Registry, count: int, first: str) -> None:
    rules = RoomRules(registry.read)
    rooms = Rooms(Connections(), rules=rules)
    room = rooms.record("main/r", party(), 0)
    for number in range(count):
        kept = change(rules, room, str(number), "x")
    assert len(kept) == min(count, 16)
    assert kept[0][0] == first
    assert (reply(room.answers, "0") is not None) == (count <= 16)
    assert reply(room.answers, str(count - 1)) == "x"
    assert change(rules, room, "more", "x", most=0) == []


def test_a_record_that_is_made_later_has_them(registry: Registry) -> None:
    """Whether they are on disk, on the way there, or both."""
    rules = RoomRules(registry.read)
    rooms = Rooms(Connections(), rules=rules)
    change(rules, None, "a", "1")
    assert reply(rooms.record("main/r", party(), 0).answers, "a") == "1"
    rooms.by_key.clear()
    registry.store(rules)
    assert not rules.unsaved
    assert reply(rooms.record("main/r", party(), 0).answers, "a") == "1"
    rooms.by_key.clear()
    change(rules, None, "a", "2")
    assert reply(rooms.record("main/r", party(), 0).answers, "a") == "2"
    later = RoomRules(registry.read)  # the next gateway
    assert reply(Rooms(Connections(), rules=later).record("main/r", party(), 0).answers, "a") == "1"


def test_what_changes_during_a_commit_stays_unsaved(registry: Registry) -> None:
    rules = RoomRules(registry.read)
    change(rules, None, "a", "1")
    on_its_way = dict(rules.unsaved)
    change(rules, None, "a", "2")
    rules.saved(on_its_way)
    assert rules.unsaved
    registry.store(rules)
    assert not rules.unsaved
    assert loads(registry.rules["main/r"]) == [["a", "2", False]]


def test_a_room_with_a_record_is_read_once(registry: Registry) -> None:
    rules = RoomRules(registry.read)
    rooms = Rooms(Connections(), rules=rules)
    room = rooms.record("main/r", party(), 0)
    assert rooms.record("main/r", party(), 0) is room
    change(rules, room, "a", "1")
    change(rules, room, "b", "2")
    rooms.know({"main": party(ping="pong")})
    assert registry.reads == 1
    assert reply(room.answers, "ping") == "pong"
    assert reply(room.answers, "b") == "2"
    rooms.know({})
    assert reply(room.answers, "ping") is None
    assert reply(room.answers, "b") == "2"


def test_a_registry_that_cannot_be_read_turns_nobody_away(registry: Registry) -> None:
    """S36: and nothing is written over what could not be read."""
    rules = RoomRules(registry.read)
    rooms = Rooms(Connections(), rules=rules)
    registry.broken = True
    room = rooms.record("main/r", party(ping="pong"), 0)
    assert reply(room.answers, "ping") == "pong"
    with pytest.raises(BrokerError):
        change(rules, room, "a", "1")
    assert not rules.unsaved
    registry.broken = False
    assert change(rules, room, "a", "1") == [["a", "1", False]]
