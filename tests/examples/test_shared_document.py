"""docs/examples/shared_document: real Yjs editors, and its messages made by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.raw_client import RawClient
from tests.examples.conftest import ExampleFactory, module_named
from tests.examples.yjs import Editors

pytestmark = pytest.mark.e2e

app: Any = module_named("shared_document")
ASK_ALL, UPDATE = b"\0\0\1\0", b"\0\2"


@pytest.fixture(scope="module")
def document(example: ExampleFactory) -> BrokerProcess:
    return example("shared_document")


@pytest.fixture
def editors() -> Iterator[Editors]:
    with Editors() as running:
        yield running


def opened(editors: Editors, document: BrokerProcess, room: str, *names: str) -> None:
    for name in names:
        editors.do("open", name, server=document.ws_url("/party"), room=room)
    for name in names:
        eventually(lambda name=name: editors.do("look", name)["synced"], "sync")  # type: ignore[misc]


def all_read(editors: Editors, text: str, *names: str) -> None:
    for name in names:
        eventually(lambda name=name: editors.do("look", name)["text"] == text, text)  # type: ignore[misc]


# --- Yjs itself


def test_editors_see_one_text_and_so_does_who_comes_later(
    document: BrokerProcess, room: str, editors: Editors
) -> None:
    opened(editors, document, room, "ana", "ben")
    editors.do("insert", "ana", text="Hello")
    all_read(editors, "Hello", "ana", "ben")
    editors.do("insert", "ben", text=", wörld 🌍")
    all_read(editors, "Hello, wörld 🌍", "ana", "ben")
    editors.do("delete", "ana", at=0, length=7)
    all_read(editors, "wörld 🌍", "ana", "ben")
    for name in ("ana", "ben"):
        editors.do("close", name)
    eventually(lambda: not document.connections(room=room), "nobody there")
    opened(editors, document, room, "late")
    assert editors.do("look", "late")["text"] == "wörld 🌍"


def test_work_without_a_network_comes_in_with_the_next_connection(
    document: BrokerProcess, room: str, editors: Editors
) -> None:
    opened(editors, document, room, "ana", "ben")
    editors.do("insert", "ana", text="one two")
    all_read(editors, "one two", "ben")
    editors.do("disconnect", "ben")
    editors.do("insert", "ben", text=" three")
    editors.do("delete", "ben", at=0, length=4)
    editors.do("insert", "ana", text="zero ", at=0)
    editors.do("connect", "ben")
    all_read(editors, "zero two three", "ana", "ben")
    opened(editors, document, room, "late")
    assert editors.do("look", "late")["text"] == "zero two three"


def test_no_key_is_lost_when_the_host_dies_under_typing_hands(
    document: BrokerProcess, room: str, editors: Editors
) -> None:
    """S22, S34: no editor notices; what is typed meanwhile waits in its socket."""
    opened(editors, document, room, "ana", "ben")
    # Each writes on one side of this: where two begin in one place at once, the order is Yjs' affair.
    editors.do("insert", "ana", text="|")
    all_read(editors, "|", "ben")
    connections = {row["id"] for row in document.connections(room=room)}
    for number in range(40):
        editors.do("insert", "ana", text="a", at=0)
        editors.do("insert", "ben", text="b")
        if number == 20:
            document.kill_host(wait_for_next=False)
    text = "a" * 40 + "|" + "b" * 40
    all_read(editors, text, "ana", "ben")
    assert {row["id"] for row in document.connections(room=room)} == connections
    opened(editors, document, room, "late")
    assert editors.do("look", "late")["text"] == text


def test_names_reach_those_who_are_there_and_those_who_come(
    document: BrokerProcess, room: str, editors: Editors
) -> None:
    opened(editors, document, room, "first")
    editors.do("name", "first", name="Ana")
    opened(editors, document, room, "second")
    editors.do("name", "second", name="Ben")
    for name in ("first", "second"):
        eventually(lambda name=name: editors.do("look", name)["names"] == ["Ana", "Ben"], "both")  # type: ignore[misc]


def test_many_updates_are_put_together(document: BrokerProcess, room: str, editors: Editors) -> None:
    opened(editors, document, room, "ana", "ben")
    text = "".join(chr(ord("a") + number % 26) for number in range(app.PUT_TOGETHER - 1))
    for letter in text:
        editors.do("insert", "ana", text=letter)
    all_read(editors, text, "ben")
    assert len(log(document, room)) == app.PUT_TOGETHER - 1
    editors.do("insert", "ben", text="!")
    eventually(lambda: len(log(document, room)) == 1, "one whole document")
    editors.do("insert", "ana", text="?")
    all_read(editors, text + "!?", "ana", "ben")
    assert len(log(document, room)) == 2
    opened(editors, document, room, "late")
    assert editors.do("look", "late")["text"] == text + "!?"


# --- Messages by hand


def come(document: BrokerProcess, room: str) -> RawClient:
    """A client that has been asked for what it has. It may have been sent what is new before."""
    client = document.connect(f"/party/{room}")
    try:
        while client.receive() != ASK_ALL:
            pass
    except BaseException:
        client.close()
        raise
    return client


def log(document: BrokerProcess, room: str) -> list[bytes]:
    """What a newcomer is given: every update that the room keeps."""
    with come(document, room) as client:
        client.send(ASK_ALL)
        updates = []
        while (message := client.receive()) != b"\0\1\2\0\0":
            assert isinstance(message, bytes) and message.startswith((UPDATE, b"\1", b"\3"))
            if message.startswith(UPDATE):  # else it is of who is there
                updates.append(app.read_field(message[2:]))
        return updates


def test_an_answer_stands_for_what_it_was_asked_for(document: BrokerProcess, room: str) -> None:
    """A client that owes two answers: the first is news, the second takes the place of all that it had been
    sent, and of nothing else. What was asked is in the connection's state, so it outlives the host.
    """
    updates = [b"%d" % number for number in range(app.PUT_TOGETHER)]
    with come(document, room) as client:
        client.send(ASK_ALL)
        for update in updates:
            client.send(UPDATE + app.field(update))
        assert [client.receive(), client.receive()] == [b"\0\1\2\0\0", ASK_ALL]
        with come(document, room) as other:
            other.send(UPDATE + app.field(b"other"))
            assert [client.receive(), client.receive()] == [b"\3", UPDATE + app.field(b"other")]
            assert log(document, room) == [*updates, b"other"]
            document.kill_host(wait_for_next=False)
            client.send(b"\0\1" + app.field(b"had this"))
            client.send(b"\0\1" + app.field(b"all"))
            assert [other.receive(), other.receive()] == [b"\3", UPDATE + app.field(b"had this")]
            assert log(document, room) == [b"all", b"other", b"had this"]


def test_who_has_not_got_everything_is_not_asked_for_everything(document: BrokerProcess, room: str) -> None:
    updates = [b"%d" % number for number in range(app.PUT_TOGETHER)]
    with come(document, room) as client:
        for update in updates:
            client.send(UPDATE + app.field(update))
        client.send(ASK_ALL)
        assert [client.receive() for _ in updates] == [UPDATE + app.field(update) for update in updates]
        assert client.receive() == b"\0\1\2\0\0"
        client.send(UPDATE + app.field(b"last"))
        # An answer that nobody asked for is an update like others.
        client.send(b"\0\1" + app.field(b"first"))
        client.send(b"\0\1" + app.field(b"second"))
    eventually(lambda: log(document, room) == [*updates, b"last", b"first", b"second"], "the last ones")


def test_what_is_not_yjs(document: BrokerProcess, room: str) -> None:
    with come(document, room) as client, come(document, room) as other:
        for message in (b"", b"\0", b"\0\2", b"\0\2\5four", b"\0\2\xff\xff\xff\xff\xff", b"\7\7", b"\0\1"):
            client.send(message)
        client.send(b"\0\2\4good")
        assert other.receive() == b"\0\2\4good"
        assert log(document, room) == [b"good"]
        other.send("text")
        while (frame := other.receive_frame())[0] != 8:
            assert frame[1] == b"\3"
        assert frame[1][2:] == b"Yjs speaks in bytes"


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 16_383, 16_384, 2_000_000])
def test_a_field_is_read_as_it_was_written(length: int) -> None:
    data = bytes(length)
    assert app.read_field(app.field(data)) == data
    with pytest.raises((ValueError, IndexError)):
        app.read_field(app.field(data)[:-1])
    with pytest.raises(ValueError, match="as long as it says"):
        app.read_field(app.field(data) + b"x")


def test_its_docs_are_true(document: BrokerProcess, follow: Callable[[BrokerProcess, str], int]) -> None:
    assert follow(document, "shared_document") == 0
