"""Options: their names, their bounds, and what may change at run time. And what errors say."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from broker.client import errors, options
from broker.client.errors import AddressError, ConnectTimeout, Refused, RetriesExhausted, SocketClosed
from broker.client.options import AddressOptions, Options, SocketOptions
from hibernation.errors import BrokerError, SettingError


def test_both_lists_of_options_have_the_same_names() -> None:
    assert {field.name for field in fields(Options)} - {"host", "room"} == set(SocketOptions.__annotations__)
    assert set(AddressOptions.__annotations__) < set(SocketOptions.__annotations__)


BOUNDS = {**options._FLOATS, **options._WHOLE}


def test_every_number_has_bounds() -> None:
    numbers = {
        field.name for field in fields(Options) if isinstance(field.default, int | float)
    } - {"start_closed"}  # fmt: skip
    assert set(BOUNDS) == numbers


@pytest.mark.parametrize("name", BOUNDS)
def test_numbers_at_their_bounds(name: str) -> None:
    low, high, _ = BOUNDS[name]
    whole = name in options._WHOLE
    step = 1 if whole else 0.001
    rest: dict[str, Any] = {"delay_max_seconds": 86_400.0} if name == "delay_min_seconds" else {}
    if name == "delay_max_seconds":
        rest = {"delay_min_seconds": 0.0}
    for value in (low, low + step, high - step, high):
        Options(**{**rest, name: value})
    for wrong in (low - step, high + step, float("nan"), "1", None, True):
        with pytest.raises(SettingError) as raised:
            Options(**{**rest, name: wrong})
        assert raised.value.source == name
        assert raised.value.given is wrong or wrong is None


@pytest.mark.parametrize(("value", "right"), [(None, True), (0, True), (1, True), (-1, False), (1.5, False)])
def test_retries(value: Any, right: bool) -> None:
    if right:
        Options(retries_max=value)
    else:
        with pytest.raises(SettingError):
            Options(retries_max=value)


def test_the_longest_pause_is_not_shorter_than_the_shortest() -> None:
    Options(delay_min_seconds=3.0, delay_max_seconds=3.0)
    with pytest.raises(SettingError, match="at least delay_min_seconds, 3"):
        Options(delay_min_seconds=3.0, delay_max_seconds=2.9)


@pytest.mark.parametrize(("length", "right"), [(1, True), (127, True), (128, True), (129, False)])
def test_ids(length: int, right: bool) -> None:
    """S10."""
    if right:
        Options(id="ü" * length)
    else:
        with pytest.raises(AddressError, match="1 to 128 printable"):
            Options(id="ü" * length)


@pytest.mark.parametrize("wrong", ["a\n", "\x00"])
def test_ids_are_printable(wrong: str) -> None:
    with pytest.raises(AddressError):
        Options(id=wrong)


def test_every_socket_has_an_id_of_its_own() -> None:
    made = [Options.of("h", "x", {}).id for _ in range(3)]
    assert len(set(made)) == 3
    assert all(each is not None and len(each) == 36 for each in made)
    assert Options.of("h", "x", {"id": None}).id is not None


def test_misspelt_options() -> None:
    with pytest.raises(TypeError, match=r"'retry_max'; there are .*retries_max"):
        Options.of("h", "x", {"retry_max": 3})  # type: ignore[typeddict-unknown-key]


@pytest.mark.parametrize("given", [{"room": 3}, {"party": b"x"}, {"host": None}, {"query": "a=1"}])
def test_wrong_types(given: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Options(**{"host": "h", "room": "x", **given})


@pytest.mark.parametrize(
    ("name", "value", "right"),
    [
        ("X-Color", "blue", True),
        ("X-Empty", "", True),
        ("X-One", "a", True),
        ("X-Latin", "ü", True),
        ("X Color", "blue", False),
        ("", "blue", False),
        ("X", "a\r\nInjected: b", False),
        ("X", " a", False),
        ("X", "日", False),
        ("X", 1, False),
    ],
)
def test_headers(name: str, value: Any, right: bool) -> None:
    if right:
        Options(headers={name: value})
    else:
        with pytest.raises(SettingError, match="header"):
            Options(headers={name: value})


def test_what_changes_at_run_time() -> None:
    before = Options.of("localhost:1", "a", {"query": {"t": "1"}, "path": "p", "party": "chat"})
    after = before.updated(None, "b", {})
    assert after.room_url == "ws://localhost:1/parties/chat/b/p"
    assert after.id == before.id
    assert after.query == {"t": "1"}
    assert before.updated("localhost:2", None, {"path": None}).room_url == "ws://localhost:2/parties/chat/a"
    assert before.updated(None, None, {"id": "new"}).id == "new"
    assert before.updated(None, None, {"id": None}).id == before.id


def test_a_room_is_given_in_the_place_of_a_url() -> None:
    before = Options.of("ws://localhost:1/party/a", None, {})
    assert before.updated(None, "b", {}).room_url == "ws://localhost:1/parties/main/b"
    assert before.updated("ws://localhost:2/party/c", None, {}).room_url == "ws://localhost:2/party/c"


def test_what_does_not_change_at_run_time() -> None:
    with pytest.raises(TypeError, match="'retries_max' cannot be changed"):
        Options.of("h", "x", {}).updated(None, None, {"retries_max": 3})  # type: ignore[typeddict-unknown-key]


# --- Errors


def test_the_tree_of_errors_is_what_the_module_says() -> None:
    text = inspect.getdoc(errors)
    assert text is not None
    for name in errors.__all__:
        assert issubclass(getattr(errors, name), BrokerError)
        assert f"── {name} " in text


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("0", 0, 0),
        ("30", 30, 30),
        (" 7 ", 7, 7),
        ("", 0, 0),
        ("soon", 0, 0),
        ("-3", 0, 0),
        ("1.5", 0, 0),
        ("9" * 5000, 1e11, 1e12),
        ("Thu, 99 Foo 2099 99:99:99 GMT", 0, 0),
    ],
)
def test_retry_after(value: str, low: float, high: float) -> None:
    """RFC 9110, section 10.2.3."""
    assert low <= Refused("ws://h", 503, [("Retry-After", value)]).retry_after_seconds <= high


@pytest.mark.parametrize(("seconds", "low", "high"), [(3_000, 2_900, 3_000), (-100, 0, 0)])
def test_retry_after_as_a_date(seconds: int, low: float, high: float) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    assert low <= Refused("ws://h", 503, [("Retry-After", date)]).retry_after_seconds <= high


def test_a_refusal_without_retry_after() -> None:
    refused = Refused("ws://h/party/x", 403, [("Content-Type", "text/plain")], b"members\n only")
    assert refused.retry_after_seconds == 0.0
    assert refused.header("CONTENT-type") == "text/plain"
    assert str(refused) == "ws://h/party/x: the server answered 403 Forbidden: members only"
    assert "connect to https://new/" in str(Refused("ws://h", 301, [("location", "https://new/")]))
    assert (
        str(Refused("ws://h", 403, [], b"\x1b[31mred\x00"))
        == "ws://h: the server answered 403 Forbidden: ?[31mred?"
    )
    assert "599" in str(Refused("ws://h", 599, [], b"\xff" * 10_000))
    assert len(str(Refused("ws://h", 599, [], b"\xff" * 10_000))) < 400


def test_texts_name_the_remedy() -> None:
    assert "`connect_timeout_seconds` allows more" in str(
        ConnectTimeout("ws://h", 4, "connect_timeout_seconds")
    )
    assert "reconnect()" in str(SocketClosed(1000, "bye"))
    assert "`retries_max`" in str(RetriesExhausted(3, "closed with 1006"))


# --- What is loaded


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import broker", ("broker.client", "trio_websocket", "quart")),
        ("import broker.client", ("broker.gateway", "quart", "hypercorn")),
    ],
)
def test_what_an_import_loads(statement: str, absent: tuple[str, ...]) -> None:
    code = f"{statement}; import sys; print([n for n in sys.modules if n.startswith({absent!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ast.literal_eval(done.stdout) == []
