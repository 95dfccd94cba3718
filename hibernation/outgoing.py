"""What room code says, checked, and in the form in which the link carries it. Pure.

Owns the limits and the forms of messages, tags, filters and closes. Must not know who says it, or in which
turn. Peers: `hibernation.room`, `connection` and `neighbours`; `broker.client`, whose messages have the same
forms.
"""

from collections.abc import Iterable
from json import dumps as dump_json
from typing import Any

from hibernation import wire
from hibernation.errors import LimitExceeded
from hibernation.settings import Settings

#: What a message may be: text, bytes, or anything else that JSON can hold.
Message = Any


def names(tags: Iterable[str] | str) -> tuple[str, ...]:
    """Several tags, or one."""
    return (tags,) if isinstance(tags, str) else tuple(tags)


def criteria_of(
    tag: str | None, all_of: Iterable[str] | str, any_of: Iterable[str] | str, none_of: Iterable[str] | str
) -> list[list[str]]:
    """One form for all filters: three lists of tags. A plain `tag` is one more that must be there."""
    if tag is None and all_of == () == any_of == none_of:
        return [[], [], []]  # as most are
    wanted = list(names(all_of))
    if tag is not None:
        wanted.append(tag)
    criteria = [wanted, list(names(any_of)), list(names(none_of))]
    return [[text(name, "a tag") for name in names] for names in criteria]


def text(value: object, what: str) -> str:
    """A text that the link can carry."""
    if not isinstance(value, str):
        raise TypeError(f"{what} is a str, not {type(value).__name__}: {value!r}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{what} holds a lone surrogate, which is no character: {value!r}") from None
    return str.__str__(value)  # of a subclass, an enumeration say, the text itself


def frame_data(message: Message) -> str | bytes:
    """A message as it goes out: text and bytes as they are, anything else as JSON text.

    Raises:
        ValueError: Text with a lone surrogate, which no UTF-8 can hold.
        TypeError: Neither text nor bytes nor a value for JSON.
    """
    if type(message) is bytes:
        return message
    if isinstance(message, bytearray | memoryview | bytes):
        return bytes(message)
    if not isinstance(message, str):
        message = dump_json(message, separators=(",", ":"), ensure_ascii=False)
    return text(message, "the message")


def size_of(data: str | bytes) -> int:
    """Bytes of a message on the wire, its head aside."""
    return len(data) if type(data) is bytes or data.isascii() else len(data.encode())  # type: ignore[union-attr]


def broadcast_of(
    key: str,
    message: Message,
    ids: Iterable[object],
    tag: str | None,
    all_of: Iterable[str],
    any_of: Iterable[str],
    none_of: Iterable[str],
) -> tuple[list[Any], int]:
    """The effect of a broadcast to the room with this key, and its size; `ids` are left out.

    Raises:
        TypeError, ValueError: See `frame_data` and `text`.
    """
    data = frame_data(message)
    without = [text(each, "an id") for each in ids]
    effect = [wire.BROADCAST, key, data, without, *criteria_of(tag, all_of, any_of, none_of)]
    return effect, size_of(data)


def check_tags(tags: Iterable[str], settings: Settings) -> tuple[str, ...]:
    """Tags without repetitions, in their order, within the limits of S11.

    Raises:
        TypeError: Something that is not a str, or one str where several are meant.
        ValueError: An empty tag, or one that is no valid Unicode.
        LimitExceeded: Too many, or one too long.
    """
    if isinstance(tags, str):
        raise TypeError(f"tags are a list of str, not one str: [{tags!r}]")
    unique = tuple(dict.fromkeys(tags))
    for tag in unique:
        if not isinstance(tag, str):
            raise TypeError(f"a tag is a str, not {type(tag).__name__}: {tag!r}")
        if not tag:
            raise ValueError("a tag is not empty")
        try:
            size = len(tag.encode())
        except UnicodeEncodeError:
            raise ValueError(f"the tag {tag!r} holds a lone surrogate, which is no character") from None
        if size > settings.tag_bytes_max:
            raise LimitExceeded("a tag", size, settings.tag_bytes_max, remedy="use a shorter tag")
    if len(unique) > settings.tags_max:
        raise LimitExceeded("a connection's tags", len(unique), settings.tags_max, "tags", remedy="use fewer")
    return unique


def check_close(code: int, reason: str) -> tuple[int, str]:
    """Give a code and a reason that may stand in a Close frame (RFC 6455, sections 5.5 and 7.4).

    Raises ValueError, or TypeError, for others.
    """
    if not isinstance(code, int):
        raise TypeError(f"a close code is an int, not {type(code).__name__}")
    if not (code in (1000, 1001, 1002, 1003) or 1007 <= code <= 1014 or 3000 <= code <= 4999):
        raise ValueError(
            f"{code} may not be sent as a close code: use 1000, or one of your own from 4000 to 4999"
        )
    reason = text(reason, "a close reason")
    size = len(reason.encode())
    if size > 123:
        raise ValueError(f"the close reason has {size} bytes of UTF-8, 123 are allowed: shorten it")
    return int(code), reason
