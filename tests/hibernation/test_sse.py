"""Server-sent events: what is written is what a reader of the specification reads (WHATWG HTML, 9.2.6)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hibernation.sse import sse


def read(stream: bytes) -> list[dict[str, str]]:
    """The events of a stream, as the algorithm of the specification has it."""
    events = []
    data, kind, last_id, retry = "", "", "", ""
    text = stream.decode().replace("\r\n", "\n").replace("\r", "\n")
    for line in text.split("\n"):
        if not line:
            if data:
                events.append({"data": data[:-1], "event": kind or "message", "id": last_id, "retry": retry})
            data, kind = "", ""
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data += value + "\n"
        elif name == "event":
            kind = value
        elif name == "id":
            last_id = value
        elif name == "retry":
            retry = value
    return events


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_arrives(text: str) -> None:
    """Line breaks of every kind are line feeds to the reader."""
    expected = text.replace("\r\n", "\n").replace("\r", "\n")
    assert [event["data"] for event in read(sse(text))] == [expected]


def test_every_field() -> None:
    [event] = read(sse("ü", event="news", id="7", retry=0, comment="not\nseen"))
    assert event == {"data": "ü", "event": "news", "id": "7", "retry": "0"}
    assert read(sse({"a": ["ü"]}))[0]["data"] == '{"a":["ü"]}'
    assert read(sse(0))[0]["data"] == "0"
    assert read(sse(comment="alive")) == []
    assert sse(comment="alive") == b": alive\n\n"
    assert read(sse(id="3") + sse("x"))[0]["id"] == "3"


@pytest.mark.parametrize(
    "fields", [{"event": "a\nb"}, {"id": "a\r"}, {"id": "\0"}, {"retry": -1}, {"retry": 1.5}, {"retry": True}]
)
def test_fields_that_would_be_others(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"of an event|milliseconds"):
        sse("x", **fields)
