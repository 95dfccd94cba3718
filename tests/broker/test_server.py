"""`Server` itself: its room, its check at the moment a class is made, and what it leaves to subclasses."""

import subprocess
import sys
import types
from typing import Any

import pytest

import broker
from broker import HookError, Server, SettingError
from hibernation.hooks import HOOKS

OTHER_ROOM: Any = types.SimpleNamespace(id="other")
ROOM: Any = types.SimpleNamespace(id="lobby")


def test_the_room_is_there_before_the_constructor_and_without_a_call_to_it():
    """S3."""

    class Chat(Server):
        def __init__(self, room):
            self.seen = self.room
            self.given = room

    chat = Chat(ROOM)
    assert chat.room is chat.seen is chat.given is ROOM


def test_the_constructor_of_the_base_may_be_called_all_the_same():
    class Chat(Server):
        def __init__(self, room):
            super().__init__(room)
            self.names = []

    assert Chat(ROOM).room is ROOM
    assert type("Plain", (Server,), {})(ROOM).room is ROOM


def test_a_field_does_not_reach_another_object():
    class Chat(Server):
        def __init__(self, room):
            self.names = [room.id]

    first, second = Chat(ROOM), Chat(OTHER_ROOM)
    assert (first.names, second.names) == (["lobby"], ["other"])
    assert first.room is not second.room


@pytest.mark.parametrize("name", HOOKS)
def test_the_base_declares_no_hook(name):
    assert not hasattr(Server, name)


def test_a_class_is_checked_when_it_is_made():
    with pytest.raises(HookError, match="nearest is on_message"):

        class Misspelt(Server):
            async def on_mesage(self, message, sender): ...

    with pytest.raises(SettingError, match="give True or False"):

        class Mistyped(Server):
            hibernate = "no"  # type: ignore[assignment]


def test_the_place_of_a_wrong_value_is_its_own_line():
    with pytest.raises(SettingError) as caught:

        class Mistyped(Server):
            tags_max = 3
            hibernate = "no"  # type: ignore[assignment] # this line

    with open(__file__) as file:
        line = next(n for n, text in enumerate(file, 1) if text.rstrip().endswith("# this line"))
    assert caught.value.source == f"Mistyped.hibernate (tests/broker/test_server.py:{line})"


def test_a_base_is_checked_again_with_what_a_subclass_mixes_in():
    class Mixin:
        def on_close(self, reason): ...

    class Chat(Server): ...

    with pytest.raises(HookError, match=r"Mixin\.on_close .*`reason` would be given the connection"):
        type("Mixed", (Mixin, Chat), {})


def test_keywords_of_a_class_reach_other_bases():
    class Registered:
        names: list[str] = []

        def __init_subclass__(cls, label="", **kwargs):
            super().__init_subclass__(**kwargs)
            Registered.names.append(label)

    class Chat(Server, Registered, label="chat"): ...

    assert Registered.names == ["chat"]


def test_every_public_name_is_there_and_no_other():
    for name in broker.__all__:
        assert getattr(broker, name) is not None
    assert len(set(broker.__all__)) == len(broker.__all__)
    assert set(broker.__all__) <= set(dir(broker))
    with pytest.raises(AttributeError, match="no attribute 'Sever'"):
        broker.Sever  # type: ignore[attr-defined]  # noqa: B018


def test_request_and_response_are_quarts():
    from quart import Request, Response

    assert issubclass(broker.Request, Request)
    assert issubclass(broker.Response, Response)
    assert "rest" in broker.Request.__annotations__


def test_quart_is_not_imported_before_somebody_asks():
    """A host whose rooms answer no HTTP does without its 35 MB."""
    code = (
        "import sys, broker, broker.app\n"
        "assert not {'quart', 'werkzeug', 'hypercorn'} & set(sys.modules), 'too early'\n"
        "from broker import Request, Response\n"
        "assert 'quart' in sys.modules, 'not at all'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_error_has_one_root():
    errors = [getattr(broker, name) for name in broker.__all__]
    errors = [error for error in errors if isinstance(error, type) and issubclass(error, Exception)]
    assert {error for error in errors if not issubclass(error, broker.BrokerError)} == {broker.Refuse}


@pytest.mark.parametrize("status", [300, 401, 403, 503, 599])
def test_refuse_takes_a_status_that_refuses(status):
    """S9."""
    refusal = broker.Refuse(status, "members only")
    assert (refusal.status, refusal.text, str(refusal)) == (status, "members only", f"{status} members only")
    assert str(broker.Refuse(status)) == str(status)


@pytest.mark.parametrize("status", [299, 200, 101, 600, 0, "403", True, 403.0])
def test_refuse_takes_no_other(status):
    with pytest.raises(ValueError, match="from 300 to 599"):
        broker.Refuse(status)


@pytest.mark.parametrize(
    ("error", "fields", "text"),
    [
        (
            broker.LimitExceeded("connection state", 20_000, 16_384, remedy="store it"),
            {"what": "connection state", "given": 20_000, "limit": 16_384, "unit": "bytes"},
            "connection state: 20,000 bytes, and at most 16,384 are allowed; store it",
        ),
        (
            broker.LimitExceeded("a connection", 65, 64, "tags"),
            {"unit": "tags", "remedy": ""},
            "a connection: 65 tags, and at most 64 are allowed",
        ),
        (broker.ConnectionClosedError("alice"), {"connection": "alice"}, "send before you close"),
        (broker.RoomGone("chat/lobby"), {"room": "chat/lobby"}, "'chat/lobby' is not in this turn any more"),
        (
            broker.TurnTimeout("on_start", 30.0, "start_timeout"),
            {"hook": "on_start", "seconds": 30.0, "setting": "start_timeout"},
            "on_start took longer than 30 s and was cancelled; `start_timeout` allows more",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_carries_its_facts(error, fields, text):
    assert {name: getattr(error, name) for name in fields} == fields
    assert text in str(error)
