"""HTTP requests to a room, for programs that hold a socket to one. On h11.

Owns `fetch`: one request on one connection, the answer read whole, within a bound and a deadline. No
redirects, cookies, proxies or compression: it is there to ask a room, and for more there are HTTP clients.
Its peer is the room's `on_request`.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, replace
from json import dumps as dump_json
from json import loads as load_json
from typing import Any, Final, Literal

import h11
import trio

from broker.client.addresses import (
    Address,
    Endpoint,
    Parameters,
    endpoint_of,
    parameters_of,
    url_of,
    whole_url,
)
from broker.client.errors import ConnectError, ConnectTimeout, ResponseTooLarge
from broker.client.options import MIB, check_headers
from broker.client.transport import dial

__all__ = ["RESPONSE_BYTES_MAX", "TIMEOUT_SECONDS", "FetchResponse", "fetch"]

RESPONSE_BYTES_MAX: Final = 16 * MIB
TIMEOUT_SECONDS: Final = 30.0

_HEAD_BYTES_MAX: Final = 2**16
_RECEIVE_BYTES: Final = 2**16


@dataclass(frozen=True, slots=True)
class FetchResponse:
    """A room's answer. `headers` are pairs in the order in which they came, names in lower case."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    url: str

    @property
    def ok(self) -> bool:
        """Whether the status is from 200 to 299."""
        return 200 <= self.status <= 299

    @property
    def text(self) -> str:
        """The body as UTF-8; what is none is replaced by U+FFFD."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body as JSON. Raises ValueError if it is none."""
        return load_json(self.body)

    def header(self, name: str) -> str | None:
        """The first header of a name, in any case, or None."""
        return next((value for each, value in self.headers if each == name.lower()), None)


async def fetch(
    host: str,
    room: str | None = None,
    *,
    party: str | None = None,
    path: str | None = None,
    base_path: str | None = None,
    prefix: str | None = None,
    protocol: Literal["http", "https"] | None = None,
    query: Parameters | None = None,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    json: Any = None,
    data: str | bytes | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    response_bytes_max: int = RESPONSE_BYTES_MAX,
    ssl_context: ssl.SSLContext | None = None,
) -> FetchResponse:
    """Ask a room by HTTP, at the address that a PartySocket with the same arguments connects to.

    `host` is a name or address with its port, or a whole URL, which then stands for the room too.

    `json` is sent as JSON, unless it is None; `data` as it is, text as UTF-8. Whatever the status is, it is
    returned.

    Raises:
        ConnectError: There was no whole answer; the request may have been carried out all the same.
        ConnectTimeout: … within `timeout_seconds`.
        ResponseTooLarge: The answer's body is longer than `response_bytes_max`.
        AddressError, SettingError, TypeError: An argument is wrong.

    Cancellation closes the connection: the room's hook is cancelled too.
    """
    address = Address(
        host,
        room=room or "",
        party="main" if party is None else party,
        path=path or "",
        base_path=base_path or "",
        prefix=prefix or "",
        protocol=protocol or "",
    )
    parameters = parameters_of(query)
    if room is None and base_path is None and (whole := whole_url(host)):
        address = replace(whole[0], path=path or "", protocol=whole[0].protocol.replace("ws", "http"))
        parameters = [*parameters_of(whole[1]), *parameters]
    url = url_of(address.room_url("http"), parameters)
    endpoint = endpoint_of(url)
    given = {name.lower(): value for name, value in (headers or {}).items()}
    check_headers(given)
    if json is not None and data is not None:
        raise TypeError("give json or data, not both")
    body = data.encode() if isinstance(data, str) else data or b""
    if json is not None:
        body = dump_json(json, ensure_ascii=False).encode()
        given.setdefault("content-type", "application/json")
    sent = {"host": endpoint.authority, "user-agent": "broker", **given, "connection": "close"}
    if body or method not in ("GET", "HEAD", "OPTIONS", "DELETE"):
        sent["content-length"] = str(len(body))
    with trio.move_on_after(timeout_seconds):
        stream = await dial(endpoint, ssl_context)
        try:
            return await _exchange(stream, endpoint, url, method, sent, body, response_bytes_max)
        except (trio.BrokenResourceError, h11.RemoteProtocolError) as error:
            raise ConnectError(
                endpoint.shown, f"the answer broke off: {error}", "the request may have been carried out"
            ) from error
        except h11.LocalProtocolError as error:
            raise TypeError(f"this makes no HTTP request: {error}") from error
        finally:
            await trio.aclose_forcefully(stream)
    raise ConnectTimeout(endpoint.shown, timeout_seconds, "timeout_seconds")


async def _exchange(
    stream: trio.abc.Stream,
    endpoint: Endpoint,
    url: str,
    method: str,
    headers: Mapping[str, str],
    body: bytes,
    response_bytes_max: int,
) -> FetchResponse:
    http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES_MAX)
    request = h11.Request(
        method=method,
        target=endpoint.target,
        headers=[(name.encode("ascii"), value.encode("latin-1")) for name, value in headers.items()],
    )
    out = (
        http.send(request) + (http.send(h11.Data(data=body)) if body else b"") + http.send(h11.EndOfMessage())
    )
    try:
        await stream.send_all(out)
    except trio.BrokenResourceError:
        pass  # whoever refuses a body early may have answered all the same
    status, received = 0, bytearray()
    received_headers: tuple[tuple[str, str], ...] = ()
    while True:
        await trio.lowlevel.checkpoint()
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(bytes(await stream.receive_some(_RECEIVE_BYTES)))
        elif isinstance(event, h11.Response):
            status = event.status_code
            received_headers = tuple(
                (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in event.headers
            )
        elif isinstance(event, h11.Data):
            received += event.data
            if len(received) > response_bytes_max:
                raise ResponseTooLarge(
                    "the body of the answer",
                    len(received),
                    response_bytes_max,
                    remedy="`response_bytes_max` allows more",
                )
        elif isinstance(event, h11.EndOfMessage):
            return FetchResponse(status, received_headers, bytes(received), url)
