"""The Python client: a WebSocket to a room that reconnects by itself.

    party_socket.py  PartySocket, for programs on trio
    sync.py          connect, BlockingSocket: the same for scripts and threads
    http.py          fetch, FetchResponse: HTTP to a room
    addresses.py     URL rules, those of the npm package partysocket (pure)
    options.py       every option, its default and its bounds (pure)
    lifecycle.py     when to connect, when to wait, when to give up (pure)
    buffers.py       what waits to be sent, and to be read (pure)
    asking.py        what the user's functions answer, in time
    transport.py     one connection, on trio-websocket
    errors.py        what is raised

Stands alone: nothing of the gateway and nothing of Quart is loaded by it, and `import broker` does not load
it. Its peer is any server that speaks to the npm package; it knows nothing of a broker's inside.
"""

from broker.client.buffers import Closed, Event, Opened
from broker.client.errors import (
    AddressError,
    ConnectError,
    ConnectTimeout,
    QueryFailed,
    Refused,
    ResponseTooLarge,
    RetriesExhausted,
    SendBufferFull,
    SocketClosed,
)
from broker.client.http import FetchResponse, fetch
from broker.client.lifecycle import State
from broker.client.options import SocketOptions, reconnect_after_every_close, retry_by_default
from broker.client.party_socket import PartySocket
from broker.client.sync import BlockingSocket, connect

__all__ = [
    "PartySocket",
    "connect",
    "BlockingSocket",
    "fetch",
    "FetchResponse",
    # what happens to a socket
    "State",
    "Opened",
    "Closed",
    "Event",
    # what it can be told
    "SocketOptions",
    "reconnect_after_every_close",
    "retry_by_default",
    # errors
    "AddressError",
    "ConnectError",
    "ConnectTimeout",
    "Refused",
    "QueryFailed",
    "RetriesExhausted",
    "SocketClosed",
    "SendBufferFull",
    "ResponseTooLarge",
]
