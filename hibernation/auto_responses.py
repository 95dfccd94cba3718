"""Automatic responses: what a rule is, and what a party declares (S16).

Owns `AutoResponse` and its bounds, and how rules travel. Must not know sockets, rooms or the order in which
rules count: that is `broker.gateway.answers`. Peers: `hibernation.party`, which reads them from a class, and
`hibernation.room`, where a turn sets them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from hibernation.errors import LimitExceeded

__all__ = ["SIDE_BYTES_MAX", "AutoResponse", "from_plain", "read_rules", "to_plain"]

#: Bytes of a request, and of a reply; text counts as UTF-8 (S16).
SIDE_BYTES_MAX: Final = 2048

#: A rule as it travels and is kept: request, reply, prefix.
Rule = tuple[str | bytes, str | bytes, bool]


@dataclass(frozen=True, slots=True)
class AutoResponse:
    """One rule: a message that is `request`, or with `prefix` begins with it, is answered with `reply`.

    The gateway answers by itself: no room wakes, and no hook sees the message. Text is matched by text alone,
    bytes by bytes; the reply may be either.

    Attributes:
        request: str or bytes, at most 2,048 bytes; not empty if it is a prefix.
        reply: str or bytes, at most 2,048 bytes.
        prefix: Whether a message may go on behind the request.

    Raises:
        TypeError: A side that is neither str nor bytes.
        ValueError: An empty prefix, or text with a lone surrogate.
        LimitExceeded: A side of more than 2,048 bytes.
    """

    request: str | bytes
    reply: str | bytes
    prefix: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "request", _side(self.request, "the request of an automatic response"))
        object.__setattr__(self, "reply", _side(self.reply, "the reply of an automatic response"))
        if not isinstance(self.prefix, bool):
            raise TypeError(f"prefix is True or False, not {self.prefix!r}")
        if self.prefix and not self.request:
            raise ValueError("an empty prefix would answer every message: give one character at least")

    @property
    def rule(self) -> Rule:
        """As it travels."""
        return self.request, self.reply, self.prefix


def _side(value: object, what: str) -> str | bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        value = bytes(value)
        size = len(value)
    elif isinstance(value, str):
        value = str.__str__(value)  # of a subclass, an enumeration say, the text itself
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise ValueError(f"{what} holds a lone surrogate, which is no character: {value!r}") from None
    else:
        raise TypeError(f"{what} is str or bytes, not {type(value).__name__}: {value!r}")
    if size > SIDE_BYTES_MAX:
        raise LimitExceeded(what, size, SIDE_BYTES_MAX, remedy="let `on_message` answer what is longer")
    return value


def read_rules(value: object) -> tuple[AutoResponse, ...]:
    """The rules of a class: a mapping of requests to replies, or a list of `AutoResponse`.

    Raises what `AutoResponse` raises; TypeError for any other form, ValueError for a request that comes
    twice.
    """
    if isinstance(value, Mapping):
        rules = [AutoResponse(request, reply) for request, reply in value.items()]
    elif isinstance(value, tuple | list) and all(isinstance(each, AutoResponse) for each in value):
        rules = list(value)
    else:
        raise TypeError(
            'give a mapping such as {"ping": "pong"}, or a list such as'
            ' [AutoResponse("ping", "pong", prefix=True)]'
        )
    seen = set()
    for rule in rules:
        name = (type(rule.request), rule.request, rule.prefix)
        if name in seen:
            raise ValueError(f"{rule.request!r} is answered twice: leave one")
        seen.add(name)
    return tuple(rules)


def to_plain(rules: Iterable[AutoResponse]) -> list[list[Any]]:
    """Rules as values that JSON and CBOR can hold; `from_plain` is the inverse."""
    return [[*_plain(rule.request), *_plain(rule.reply), rule.prefix] for rule in rules]


def from_plain(rules: Iterable[list[Any]]) -> tuple[Rule, ...]:
    """Reads what `to_plain` made."""
    return tuple([(_real(each[0], each[1]), _real(each[2], each[3]), each[4]) for each in rules])


def _plain(side: str | bytes) -> tuple[bool, str]:
    return (True, side) if isinstance(side, str) else (False, side.hex())


def _real(is_text: bool, side: str) -> str | bytes:
    return side if is_text else bytes.fromhex(side)
