"""Automatic responses: which rule answers a message, and the rules that rooms have set for themselves (S16).

Owns `Answers`, the rules of one party or room ready to be matched, and `RoomRules`, where those of rooms are
found. Must not touch a socket: `inbox` asks, and `lifecycle` sends. Peers: `hibernation.auto_responses` for
what a rule may be, `storage.registry`, which keeps the rules of rooms for ever.

Of a room's own rules memory holds those of the rooms that have a record here, and those that are not known to
be on disk; the others are read when their room gets a record.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from cbor2 import dumps, loads

from broker.gateway.frames import encode_message
from hibernation.auto_responses import Rule
from hibernation.logs import get_logger
from storage.errors import BrokerError

if TYPE_CHECKING:
    from broker.gateway.rooms import RoomRecord

log = get_logger("answers")

#: For one type of message: replies to whole messages; the longest of these; prefixes, at once and one by one.
_Table = tuple[dict[Any, bytes], int, tuple[Any, ...], list[tuple[Any, bytes]]]
_EMPTY: Final[_Table] = ({}, -1, (), [])


class Answers:
    """The rules that hold for a room, with their replies as frames.

    A whole message goes before a prefix, a longer prefix before a shorter one, and of two equal requests the
    one in the earlier group.
    """

    __slots__ = ("_bytes", "_text")

    def __init__(self, *groups: Iterable[Rule]) -> None:
        rules = [rule for group in groups for rule in group]
        self._text = _table([rule for rule in rules if isinstance(rule[0], str)])
        self._bytes = _table([rule for rule in rules if not isinstance(rule[0], str)])

    def match(self, message: str | bytes) -> bytes | None:
        """The frame that answers this message; None: it is the room's."""
        exact, longest, starts, prefixes = self._text if type(message) is str else self._bytes
        if len(message) <= longest:
            frame = exact.get(message)
            if frame is not None:
                return frame
        if starts and message.startswith(starts):
            for start, frame in prefixes:
                if message.startswith(start):
                    return frame
        return None


def _table(rules: Sequence[Rule]) -> _Table:
    if not rules:
        return _EMPTY
    exact: dict[Any, bytes] = {}
    begun: dict[Any, bytes] = {}
    for request, reply, prefix in rules:
        (begun if prefix else exact).setdefault(request, encode_message(reply))
    prefixes = sorted(begun.items(), key=lambda each: -len(each[0]))
    return exact, max(map(len, exact), default=-1), tuple(begun), prefixes


class RoomRules:
    """See the module.

    Args:
        read: Gives what the registry holds of a room, by its key.
    """

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        self._read = read
        #: What is not known to be in the registry: rules as it holds them, None for none.
        self.unsaved: dict[str, bytes | None] = {}

    def apply(self, room: "RoomRecord") -> None:
        """The party of a room's record is another one, or the record is new."""
        own = room.own_answers
        if own is None:
            try:
                own = self._of(room.key)
            except BrokerError as error:
                # Nobody is turned away for it; whoever changes the rules asks again.
                log.error("a room's automatic responses cannot be read", room=room.key, error=str(error))
                room.answers = room.party.answers
                return
        self._hold(room, own)

    def change(
        self,
        room: "RoomRecord | None",
        key: str,
        request: str | bytes,
        reply: str | bytes | None,
        *,
        prefix: bool,
        most: int,
    ) -> bytes | None:
        """A room sets a rule, or takes one away (`reply` is None); of more than `most` the oldest goes.

        `room` is its record, if it has one. Gives what the registry has to hold now; it is in `unsaved` until
        `saved` is told.

        Raises:
            BrokerError: What the room has set before cannot be read.
        """
        own = None if room is None else room.own_answers
        rules = [
            rule
            for rule in (self._of(key) if own is None else own)
            if (rule[0], rule[2]) != (request, prefix) or type(rule[0]) is not type(request)
        ]
        if reply is not None:
            rules.append((request, reply, prefix))
        if len(rules) > most:
            log.warning(
                "a room sets more automatic responses than auto_responses_max: the oldest goes",
                room=key,
                given=len(rules),
                limit=most,
                remedy="take some away with set_auto_response(request, None), or raise auto_responses_max",
            )
            rules = rules[len(rules) - most :]
        if room is not None:
            self._hold(room, rules)
        blob = self.unsaved[key] = dumps(rules) if rules else None
        return blob

    def saved(self, changes: dict[str, bytes | None]) -> None:
        """These are in the registry; what has been changed since is not."""
        for key, blob in changes.items():
            if key in self.unsaved and self.unsaved[key] == blob:
                del self.unsaved[key]

    @staticmethod
    def _hold(room: "RoomRecord", rules: Sequence[Rule]) -> None:
        room.own_answers = rules
        room.answers = Answers(rules, room.party.auto_responses) if rules else room.party.answers

    def _of(self, key: str) -> tuple[Rule, ...]:
        """A tuple, since all rooms that have none share the empty one."""
        blob = self.unsaved[key] if key in self.unsaved else self._read(key)
        rules = () if blob is None else loads(blob)
        return tuple((request, reply, prefix) for request, reply, prefix in rules)
