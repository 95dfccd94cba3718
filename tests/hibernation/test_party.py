"""From classes to parties: names, settings on the class, what a host and a gateway are told."""

import inspect
import json
from typing import Any

import pytest

from broker.server import Server
from hibernation.auto_responses import AutoResponse, from_plain
from hibernation.errors import AppError, HookError, LimitExceeded, SettingError
from hibernation.party import Party, kebab, make_parties
from hibernation.settings import ROOM_SETTINGS, RoomSettings, Settings


def room(name="Chat", **members):
    return type(name, (Server,), members)


@pytest.mark.parametrize(
    ("name", "party"),
    [
        ("Chat", "chat"),
        ("ChatRoom", "chat-room"),
        ("HTTPServer", "http-server"),
        ("MyHTTPServer", "my-http-server"),
        ("HTTP", "http"),
        ("Room2", "room2"),
        ("Room2Go", "room2-go"),
        ("chat_room", "chat-room"),
        ("Chat_Room", "chat-room"),
        ("Chat__Room_", "chat-room"),
        ("A", "a"),
        ("AB", "ab"),
        ("Main", "main"),
    ],
)
def test_a_party_has_the_kebab_case_name_of_its_class(name, party):
    assert kebab(name) == party
    assert Party.from_class(room(name)).name == party


def test_a_name_without_letters_is_refused():
    with pytest.raises(AppError, match="no party name"):
        Party.from_class(room("__"))


@pytest.mark.parametrize(
    ("names", "parties"),
    [
        (["Chat"], [("chat", ("main",))]),
        (["Main"], [("main", ())]),
        (["Main", "Chat"], [("main", ()), ("chat", ())]),
        (["Chat", "Game"], [("chat", ()), ("game", ())]),
        ([], []),
    ],
)
def test_the_only_party_or_the_one_called_main_is_main(names, parties):
    assert [(p.name, p.aliases) for p in make_parties([room(name) for name in names])] == parties


def test_two_parties_of_one_name_are_refused_and_both_named():
    with pytest.raises(AppError, match=r'ChatRoom.* and Chat_Room.* would both be the party "chat-room"'):
        make_parties([room("ChatRoom"), room("Game"), room("Chat_Room")])


@pytest.mark.parametrize("hook", ["on_fetch", "on_cron"])
def test_a_hook_of_the_main_party_stands_nowhere_else(hook):
    with_hook = {hook: staticmethod(lambda: None)}
    assert make_parties([room("Chat", **with_hook)])[0].hooks == {hook}
    make_parties([room("Main", **with_hook), room("Game")])
    for names in (["Main", "Chat"], ["Game", "Chat"]):
        with pytest.raises(HookError, match='main party only, and this is the party "chat"'):
            make_parties([room(names[0]), room("Chat", **with_hook)])


def test_a_base_that_main_shares_may_have_its_hooks():
    base = room("_Base", on_fetch=staticmethod(lambda request: None))
    parties = make_parties([type("Main", (base,), {}), type("Chat", (base,), {})])
    assert all("on_fetch" in party.hooks for party in parties)


def test_a_party_tells_its_host_how_hooks_are_called():
    class Chat(Server):
        def on_message(self, message): ...
        async def on_connect(self, connection, ctx): ...

    party = Party.from_class(Chat)
    assert party.hooks == {"on_message", "on_connect"}
    assert (party.has_on_start, party.on_message_parameters) == (False, 1)
    assert party.specs["on_connect"].is_async
    assert Party.from_class(room(on_start=lambda self: None)).has_on_start


@pytest.mark.parametrize(
    ("hibernate", "on_class", "of_instance", "seconds"),
    [
        (True, ..., None, 0),
        (False, ..., None, 10),
        (True, ..., 3, 3),
        (False, ..., 3, 3),
        (True, 7, 3, 7),
        (False, 0, None, 0),
        (False, None, 3, 10),
    ],
)
def test_idle_seconds_are_the_classes_then_the_instances_then_by_hibernate(
    hibernate, on_class, of_instance, seconds
):
    """S6."""
    members = {"hibernate": hibernate} | ({} if on_class is ... else {"idle_seconds": on_class})
    settings = Party.from_class(room(**members)).settings(Settings(idle_seconds=of_instance))
    assert settings.idle_seconds == seconds
    assert settings.hibernate is hibernate


def test_a_class_sets_what_concerns_its_rooms_and_the_rest_is_the_instances():
    class Base(Server):
        tags_max = 3
        turn_timeout = 2

    class Chat(Base):
        tags_max = 5
        origins = ["https://A.example"]

    settings = Party.from_class(Chat).settings(Settings(tags_max=9, state_bytes_max=99, durability="os"))
    assert isinstance(settings, RoomSettings)
    assert (settings.tags_max, settings.turn_timeout, settings.state_bytes_max) == (5, 2.0, 99)
    assert settings.origins == ("https://a.example",)
    assert settings.durability == "os"


def test_a_value_that_contradicts_the_instance_names_the_class():
    party = Party.from_class(room(outbox_bytes_max=2**21))
    with pytest.raises(SettingError, match=r"^Chat.*outbox_bytes_max.*outbox_total_bytes_max"):
        party.settings(Settings(outbox_bytes_max=1024, outbox_total_bytes_max=2**20))


@pytest.mark.parametrize("setting", ROOM_SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_of_rooms_is_declared_on_server_and_checked_when_a_class_is_made(setting):
    assert setting.name in inspect.get_annotations(Server)
    with pytest.raises(SettingError) as caught:
        room(**{setting.name: object()})
    assert caught.value.source.startswith(f"Chat.{setting.name}")
    assert setting.allowed_text in str(caught.value)


def test_server_declares_no_setting_that_rooms_cannot_have():
    own = {"room", "hibernate", "concurrency", "subprotocols", "auto_responses", "cors"}
    own |= {"stream_requests", "static", "crons", "cron_timezone"}
    assert set(inspect.get_annotations(Server)) == own | {setting.name for setting in ROOM_SETTINGS}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("hibernate", 1, "give True or False, not 1"),
        ("hibernate", "False", "give True or False"),
        ("concurrency", "parallel", 'give "serial", "per_connection" or "interleave"'),  # S19
        ("concurrency", ["serial"], 'give "serial", "per_connection" or "interleave"'),
        ("subprotocols", "chat", "tuple or list"),  # S17
        ("subprotocols", ["chat v2"], "without spaces"),
        ("subprotocols", ("chat\r\nX: y",), "without spaces"),
        ("subprotocols", [b"chat"], "tuple or list"),
        ("stream_requests", 1, "True or False"),
        ("static", "", "folder"),
        ("cors", "yes", "True, False, or headers"),
        ("cors", {"X": 1}, "headers"),
        ("cors", {"X Y": "z"}, "headers"),
        ("cors", {"X": "a\r\nY: b"}, "headers"),
        ("auto_responses", "ping", "give a mapping"),  # S16
        ("auto_responses", ["ping"], "give a mapping"),
        ("auto_responses", {"ping": 1}, "the reply of an automatic response is str or bytes, not int"),
        ("auto_responses", {1: "pong"}, "the request of an automatic response is str or bytes, not int"),
        ("auto_responses", {"ping": None}, "str or bytes, not NoneType"),
        ("auto_responses", {"\ud800": "pong"}, "lone surrogate"),
        ("auto_responses", {"p" * 2049: "pong"}, "2,049 bytes, and at most 2,048 are allowed; let"),
        ("auto_responses", {"ping": b"p" * 2049}, "2,049 bytes, and at most 2,048 are allowed; let"),
        ("auto_responses", [AutoResponse("a", "b"), AutoResponse("a", "c")], "answered twice: leave one"),
        ("auto_response", {"ping": "pong"}, "nearest is auto_responses"),
        ("compression", "gzip", '"off" or "deflate"'),
        ("idle_seconds", -1, "from 0 to"),
        ("tags_max", 1.5, "a whole number"),
        ("origins", "https://a.example", "origins such as"),
        ("idle_second", 3, "nearest is idle_seconds"),
        ("hibernates", False, "nearest is hibernate"),
        ("turn_timeout_seconds", 3, "nearest is turn_timeout"),
        ("subprotocol", "chat", "nearest is subprotocols"),
        ("durability", "os", "the whole broker's: give --durability"),
        ("max_awake_rooms", 3, "the whole broker's: give --max-awake-rooms"),
    ],
)
def test_a_wrong_setting_on_a_class_is_named_with_what_to_give(name, value, says):
    with pytest.raises(SettingError) as caught:
        room(**{name: value})
    assert caught.value.source.startswith(f"Chat.{name}")
    assert says in str(caught.value)


@pytest.mark.parametrize("name", ["limit", "HISTORY", "_idle_second", "drain"])
def test_other_attributes_are_the_authors(name):
    room(**{name: 3 if name != "drain" else lambda self: None})


def test_subprotocols_keep_their_order():
    """S17."""
    party = Party.from_class(room(subprotocols=["v2", "v1", "v2"]))
    assert party.subprotocols == ("v2", "v1")


def test_automatic_responses_are_read_from_a_mapping_or_a_list():
    """S16."""
    assert Party.from_class(room()).auto_responses == ()
    rules: dict[Any, Any] = {"ping": "pong", b"\x09": b"\x0a", "": "empty", "p" * 2048: "q" * 2048}
    party = Party.from_class(room(auto_responses=rules))
    assert party.auto_responses == tuple(AutoResponse(request, reply) for request, reply in rules.items())
    listed = [AutoResponse("a", "b"), AutoResponse("a", "c", prefix=True), AutoResponse(b"a", "d")]
    party = Party.from_class(room(auto_responses=listed))
    assert party.auto_responses == tuple(listed)
    description = party.describe()["auto_responses"]
    assert json.loads(json.dumps(description)) == description
    assert from_plain(description) == (("a", "b", False), ("a", "c", True), (b"a", "d", False))


@pytest.mark.parametrize(("count", "most"), [(15, 16), (16, 16), (17, 16), (17, 17), (0, 0), (1, 0)])
def test_the_number_of_automatic_responses_is_bounded(count, most):
    """S16."""
    party = Party.from_class(room(auto_responses={str(n): "x" for n in range(count)}))
    settings = Settings(auto_responses_max=most)
    if count <= most:
        assert party.settings(settings).auto_responses_max == most
        return
    with pytest.raises(
        SettingError, match=f"{count} rules, and at most {most} are allowed; .*raise auto_resp"
    ):
        party.settings(settings)


def test_a_class_may_raise_the_number_of_its_automatic_responses():
    rules = {str(n): "x" for n in range(20)}
    party = Party.from_class(room(auto_responses=rules, auto_responses_max=20))
    assert party.settings(Settings()).auto_responses_max == 20


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("", "x", True), ValueError),
        (("a", "x", 1), TypeError),
        ((None, "x"), TypeError),
        (("a", ["x"]), TypeError),
        (("\u00e9" * 1025, "x"), LimitExceeded),
        (("a", b"x" * 2049), LimitExceeded),
    ],
)
def test_what_an_automatic_response_may_not_be(arguments, error):
    with pytest.raises(error):
        AutoResponse(*arguments)


def test_an_automatic_response_holds_plain_text_and_bytes():
    sides: list[Any] = [bytearray(b"a"), memoryview(b"b")]
    rule = AutoResponse(*sides)
    assert rule.rule == (b"a", b"b", False)
    assert AutoResponse("\u00e9" * 1024, b"x" * 2048, prefix=True).prefix


def test_cors_is_headers_or_nothing():
    assert Party.from_class(room()).cors is None
    assert Party.from_class(room(cors=False)).cors is None
    assert ("Access-Control-Allow-Origin", "*") in (Party.from_class(room(cors=True)).cors or ())
    assert Party.from_class(room(cors={"Access-Control-Allow-Origin": "https://a.example"})).cors == (
        ("Access-Control-Allow-Origin", "https://a.example"),
    )


def test_a_gateway_is_told_in_plain_values():
    party = make_parties(
        [
            room(
                on_message=lambda self: None,
                origins=("https://a.example",),
                subprotocols=("v1",),
                cors={"A": "b"},
            )
        ]
    )[0]
    description = party.describe()
    assert json.loads(json.dumps(description)) == description
    assert description == {
        "name": "chat",
        "aliases": ["main"],
        "hooks": ["on_message"],
        "hibernate": True,
        "concurrency": "serial",
        "subprotocols": ["v1"],
        "auto_responses": [],
        "stream_requests": False,
        "static": False,
        "cors": [["A", "b"]],
        "settings": {"origins": ["https://a.example"]},
    }
    assert Settings().override(description["settings"]).origins == ("https://a.example",)


def test_a_cron_hook_without_crons_is_said_and_crons_without_the_hook():
    """S31."""
    hook = staticmethod(lambda: None)
    (notice,) = Party.from_class(room(on_cron=hook)).notices
    assert "Chat.on_cron is never called" in notice
    (notice,) = Party.from_class(room(crons={"a": "* * * * *"})).notices
    assert "Chat.crons are never run" in notice
    assert Party.from_class(room(crons={"a": "* * * * *"}, on_cron=hook)).notices == ()
