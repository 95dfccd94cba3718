"""The errors that people who write rooms, or run them, can meet.

Owns their classes and their texts: an error carries its facts as fields, and the text is made from them.
Must not import anything but the root. What lies on disk has its errors in `storage.errors`; what a client did
wrong is no exception for anybody, but a status or a close code.

    BrokerError
    ├── AppError                 the app cannot be served as it is
    │   └── HookError            one hook of one class is wrong
    ├── SettingError             one value, flag, variable or class attribute is wrong
    ├── LimitExceeded            a value given to the broker is larger than a setting allows
    ├── ConnectionClosedError    a send after the turn's own close
    ├── RoomGone                 a room was used after it had left memory
    ├── TurnTimeout              a hook took longer than it may
    ├── UnknownParty             `parties[name]` of an app that has no such party
    ├── FetchTimeout             another room did not answer in time
    ├── FetchCircle              rooms wait for each other in a circle
    └── DeadLetter               an event ended its host again and again, and is given up
    Refuse                       no error: the answer of a before-hook
"""

from collections.abc import Iterable, Sequence

from storage.errors import BrokerError

__all__ = [
    "AppError",
    "BrokerError",
    "ConnectionClosedError",
    "DeadLetter",
    "FetchCircle",
    "FetchTimeout",
    "HookError",
    "LimitExceeded",
    "Refuse",
    "RoomGone",
    "SettingError",
    "TurnTimeout",
    "UnknownParty",
]


class AppError(BrokerError):
    """The app cannot be served as it is. The text says why, and what to do.

    `details` holds further lines for the developer's terminal, or "": the traceback of the app's own frames
    when importing it failed. It may show code, so it never leaves the machine.
    """

    def __init__(self, text: str, *, details: str = "") -> None:
        super().__init__(text)
        self.details = details


class HookError(AppError):
    """A hook of a `Server` subclass is misspelt, or cannot be called as hooks are called.

    Raised where the class is made, so importing the app shows it.

    `owner` is the class that defines the hook, `hook` the attribute, `location` "path:line" ("" when
    unknown), `problem` what is wrong, `found` the line that was found (or ""), and `remedy` what to write in
    its place.
    """

    def __init__(
        self, owner: str, hook: str, problem: str, *, location: str = "", found: str = "", remedy: str = ""
    ) -> None:
        lines = [f"{owner}.{hook}{f' ({location})' if location else ''}: {problem}."]
        if found:
            lines.append(f"  found: {found}")
        if remedy:
            lines.append("  write: " + remedy.replace("\n", "\n         "))
        super().__init__("\n".join(lines))
        self.owner = owner
        self.hook = hook
        self.problem = problem
        self.location = location
        self.found = found
        self.remedy = remedy


class SettingError(BrokerError):
    """A setting does not exist, or its value is not one that it can have.

    `source` says where it was set ("--idle-seconds", "BROKER_IDLE_SECONDS", "Chat.idle_seconds (chat.py:9)"),
    `given` the value, or None when the setting itself is at fault, and `allowed` what to give instead.
    """

    def __init__(self, source: str, allowed: str, *, given: object = None) -> None:
        super().__init__(f"{source}: {allowed}" + ("" if given is None else f", not {_shown(given)}"))
        self.source = source
        self.allowed = allowed
        self.given = given


class LimitExceeded(BrokerError):
    """Something given to the broker is larger than a limit allows; nothing has changed.

    `what` names it ("connection state"), `given` and `limit` are counted in `unit` ("bytes", "tags", …),
    `remedy` says what to do, usually which setting raises the limit.
    """

    def __init__(self, what: str, given: int, limit: int, unit: str = "bytes", *, remedy: str = "") -> None:
        text = f"{what}: {given:,} {unit}, and at most {limit:,} are allowed"
        super().__init__(f"{text}; {remedy}" if remedy else text)
        self.what = what
        self.given = given
        self.limit = limit
        self.unit = unit
        self.remedy = remedy


class ConnectionClosedError(BrokerError):
    """`send` on a connection that its room has closed, or that has ended: in this turn or before (S18).

    A connection that its client has left raises nothing: what is sent to it is dropped and counted.
    `connection` is its id.
    """

    def __init__(self, connection: str) -> None:
        super().__init__(f"connection {connection!r} has been closed: send before you close")
        self.connection = connection


class RoomGone(BrokerError):
    """A room, or a connection of it, was used outside of the turn that it was given to (S8, S20).

    Something outlived that turn: a task of one's own, a global, a timer of another library, the rest of a
    streamed answer. `room` is "party/id".
    """

    def __init__(self, room: str) -> None:
        super().__init__(
            f"room {room!r} is not in this turn any more: effects and writes belong into the hook that was "
            "given `self` or `connection`, while it runs; keep neither for later"
        )
        self.room = room


class TurnTimeout(BrokerError):
    """A hook took longer than its setting allows and was cancelled; what its turn had staged is discarded
    (S3, S20).

    `hook` is its name, `seconds` the time it had, `setting` the setting that allows more.
    """

    def __init__(self, hook: str, seconds: float, setting: str = "turn_timeout") -> None:
        super().__init__(f"{hook} took longer than {seconds:g} s and was cancelled; `{setting}` allows more")
        self.hook = hook
        self.seconds = seconds
        self.setting = setting


class UnknownParty(BrokerError, KeyError):
    """`parties[name]` with a name that is none (S30). A KeyError, too.

    `name` is what was given, `known` the names that there are.
    """

    def __init__(self, name: object, known: Iterable[str]) -> None:
        self.name = name
        self.known = tuple(known)
        super().__init__(name)

    def __str__(self) -> str:
        return f"the app has no party {self.name!r}: there are {', '.join(self.known)}"


class FetchTimeout(BrokerError):
    """A room that was fetched did not answer within `fetch_timeout` (S30). What it did stands, if it did
    anything; if its turn still ran, it was cancelled.

    `room` is "party/id", `seconds` the time it had, `waits_for` the rooms that it waited for itself, each for
    the next.
    """

    def __init__(self, room: str, seconds: float, waits_for: Sequence[str] = ()) -> None:
        chain = f"; it waits for {' → '.join(waits_for)}" if waits_for else ""
        super().__init__(
            f"room {room!r} did not answer within {seconds:g} s{chain}; `fetch_timeout` allows more"
        )
        self.room = room
        self.seconds = seconds
        self.waits_for = tuple(waits_for)


class FetchCircle(BrokerError):
    """A fetch that would never be answered: the rooms wait for each other in a circle (S30).

    Raised at once by the fetch that would close it. `circle` names the rooms, "party/id", each of which waits
    for the next; the first is the one that fetches, and the last one, too.
    """

    def __init__(self, circle: Sequence[str]) -> None:
        super().__init__(
            f"rooms wait for each other in a circle: {' → '.join(circle)}; answer one of these requests"
            " without fetching, or fetch outside of a turn"
        )
        self.circle = tuple(circle)


class DeadLetter(BrokerError):
    """An event ended the host of its room again and again; it is not given to its hook any more (S23).

    `on_error` is called with it, once. `event` is "message", "connect", "close" or "alarm", `tries` how often
    the event was run, `reason` how the hosts ended. The event is kept: `broker dead-letters` lists it, and
    can have it run once more.
    """

    def __init__(self, event: str, tries: int, reason: str) -> None:
        article, times = "an" if event == "alarm" else "a", "time" if tries == 1 else "times"
        super().__init__(
            f"{article} {event} ended its host {tries} {times} ({reason}): it is given up; "
            "`broker dead-letters` keeps it, and `broker dead-letters replay` runs it again"
        )
        self.event = event
        self.tries = tries
        self.reason = reason


class Refuse(Exception):
    """Raise it in `on_before_connect` or `on_before_request` to turn a client away (S9).

        raise Refuse(403, "members only")

    `status` is an HTTP status from 300 to 599, `text` the body of the answer, as plain text. The client sees
    both. Return a `Response` instead to set headers or another kind of body.

    Raises ValueError for any other status: an answer below 300 would not be a refusal.
    """

    def __init__(self, status: int, text: str = "") -> None:
        if type(status) is not int or not 300 <= status <= 599:
            raise ValueError(f"Refuse takes an HTTP status from 300 to 599, not {status!r}")
        super().__init__(status, text)
        self.status = status
        self.text = text

    def __str__(self) -> str:
        return f"{self.status} {self.text}".rstrip()


def _shown(value: object) -> str:
    """The value as it was written, cut to what fits on a line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
