"""The errors of the client, all of them `BrokerError`.

Owns their classes and texts, and the reading of Retry-After. Pure. Addresses in texts never have their query:
that is where tokens are.

    BrokerError
    ├── AddressError             host, room, party, path or a URL is none
    ├── ConnectError             one attempt to connect, or a request, did not come about
    │   ├── ConnectTimeout       … in time
    │   ├── Refused              … because the server answered with a status
    │   └── QueryFailed          … because a function for query or protocols failed
    ├── RetriesExhausted         so many attempts in a row failed
    ├── SocketClosed             the socket was used after its end
    └── LimitExceeded
        ├── SendBufferFull       more waits to be sent than may
        └── ResponseTooLarge     the answer to a request is larger than it may be
"""

from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from time import time

from hibernation.errors import BrokerError, LimitExceeded

__all__ = [
    "AddressError",
    "ConnectError",
    "ConnectTimeout",
    "QueryFailed",
    "Refused",
    "ResponseTooLarge",
    "RetriesExhausted",
    "SendBufferFull",
    "SocketClosed",
]

_SHOWN_BODY_CHARACTERS = 200


class AddressError(BrokerError):
    """What was given makes no address, or another one than it seems to.

    `what` names the argument ("room"), `given` is its value, `problem` what is wrong with it as a clause, and
    `remedy` what to write instead.
    """

    def __init__(self, what: str, given: object, problem: str, remedy: str) -> None:
        super().__init__(f"{what}={given!r}: {problem}; {remedy}")
        self.what = what
        self.given = given
        self.problem = problem
        self.remedy = remedy


class ConnectError(BrokerError):
    """An attempt to connect, or a request, did not come about.

    `url` is the address without its query, `reason` what went wrong, `remedy` what may help ("" when that is
    only to try again). The error of the system, if there is one, is `__cause__`.
    """

    def __init__(self, url: str, reason: str, remedy: str = "") -> None:
        super().__init__(f"{url}: {reason}" + (f"; {remedy}" if remedy else ""))
        self.url = url
        self.reason = reason
        self.remedy = remedy


class ConnectTimeout(ConnectError):
    """There was no connection, or no whole answer, within `seconds`."""

    def __init__(self, url: str, seconds: float, setting: str) -> None:
        super().__init__(url, f"not within {seconds:g} s", f"`{setting}` allows more")
        self.seconds = seconds


class Refused(ConnectError):
    """The server answered an upgrade with an HTTP status other than 101.

    `status`, `headers` (pairs of name in lower case and value) and `body` are the answer's.
    """

    def __init__(
        self, url: str, status: int, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
    ) -> None:
        self.status = status
        self.headers = tuple((name.lower(), value) for name, value in headers)
        self.body = body
        try:
            title = f"{status} {HTTPStatus(status).phrase}"
        except ValueError:
            title = str(status)
        shown = " ".join(body[: 4 * _SHOWN_BODY_CHARACTERS].decode(errors="replace").split())
        text = "".join(c if c.isprintable() else "?" for c in shown[:_SHOWN_BODY_CHARACTERS])
        super().__init__(
            url, f"the server answered {title}" + (f": {text}" if text else ""), self._remedy_of(status)
        )

    def _remedy_of(self, status: int) -> str:
        if 300 <= status <= 399:
            where = self.header("location")
            return f"redirects are not followed: connect to {where}" if where else ""
        return {404: "check party, room and prefix", 400: "check room and id"}.get(status, "")

    def header(self, name: str) -> str | None:
        """The value of a header of the answer, or None."""
        return next((value for each, value in self.headers if each == name.lower()), None)

    @property
    def retry_after_seconds(self) -> float:
        """What the answer's Retry-After asks for, from now on; 0 where it has none that can be read.

        Source: RFC 9110, section 10.2.3: a number of seconds, or a date.
        """
        value = (self.header("retry-after") or "").strip()
        if value.isascii() and value.isdigit():
            return float(value[:12])
        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time())
        except (ValueError, OverflowError):
            return 0.0


class QueryFailed(ConnectError):
    """The function given as `query` or `protocols` raised, took too long, or gave no such thing.

    What it raised is `__cause__`.
    """


class RetriesExhausted(BrokerError):
    """`retries_max` attempts after the first one failed, without a stable connection in between.

    `tries` counts all of them, `last` is what the last one came to: the error, which is also `__cause__`, or
    a text.
    """

    def __init__(self, tries: int, last: ConnectError | str) -> None:
        super().__init__(
            f"given up after {tries} attempts, the last of which: {last}; `retries_max` allows more, and "
            "reconnect() begins anew"
        )
        self.tries = tries
        self.last = last


class SocketClosed(BrokerError):
    """The socket has been closed, by `close` or by a close of the server that `should_reconnect` let stand.

    `code` and `reason` are the close's.
    """

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(
            f"the socket has been closed ({code}{f' {reason}' if reason else ''}); reconnect() opens it again"
        )
        self.code = code
        self.reason = reason


class SendBufferFull(LimitExceeded):
    """More waits to be sent than `buffer_messages_max` and `buffer_bytes_max` allow; nothing was added."""


class ResponseTooLarge(LimitExceeded):
    """The body of an answer is larger than `response_bytes_max`; `given` is how much had come by then."""
