"""What is found out before a connection is made or closed: the answers of the user's functions, and the code.

Owns the deadline of those functions and the check of what they give. Its peer is `party_socket`, which asks
before each attempt.
"""

import inspect
import re
from collections.abc import Callable
from typing import Any, Final

import trio

from broker.client.addresses import parameters_of
from broker.client.errors import QueryFailed
from broker.client.options import Options

__all__ = ["checked_close", "resolve_protocols", "resolve_query"]

REASON_BYTES_MAX: Final = 123  # RFC 6455, section 5.5: 125 less the code

_CODES: Final = frozenset({1000, 1001, 1002, 1003, *range(1007, 1015)})

_token = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+").fullmatch


async def resolve_query(options: Options) -> list[tuple[str, str]]:
    """The parameters of the query, the function asked if it is one."""
    query = options.query
    return parameters_of(await _ask("query", query, options) if callable(query) else query)


async def resolve_protocols(options: Options) -> list[str]:
    """The subprotocols to offer, the function asked if it is one."""
    protocols: Any = options.protocols
    if callable(protocols):
        protocols = await _ask("protocols", protocols, options)
    offered = [protocols] if isinstance(protocols, str) else list(protocols or ())
    for each in offered:
        if not isinstance(each, str) or not _token(each):
            raise TypeError(f"a subprotocol is letters, digits and -._~!#$%&'*+^`|, not {each!r}")
    return offered


async def _ask(name: str, function: Callable[[], Any], options: Options) -> Any:
    seconds = options.connect_timeout_seconds
    try:
        with trio.move_on_after(seconds):
            found = function()
            return await found if inspect.isawaitable(found) else found
    except Exception as error:
        raise QueryFailed(
            options.room_url, f"the function for `{name}` raised {type(error).__name__}: {error}"
        ) from error
    raise QueryFailed(
        options.room_url,
        f"the function for `{name}` did not return within {seconds:g} s",
        "`connect_timeout_seconds` allows more",
    )


def checked_close(code: int, reason: str) -> tuple[int, str]:
    """Code and reason, if a client can send them (RFC 6455, section 7.4). Raises ValueError."""
    if type(code) is not int or not (code in _CODES or 3000 <= code <= 4999):
        raise ValueError(f"a close code is 1000 to 1003, 1007 to 1014 or 3000 to 4999, not {code!r}")
    size = len(reason.encode())
    if size > REASON_BYTES_MAX:
        raise ValueError(f"the reason of a close has at most {REASON_BYTES_MAX} bytes of UTF-8, not {size}")
    return code, reason
