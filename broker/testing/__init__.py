"""What users test their rooms with: an app in memory, on a virtual clock, without ports and without waiting.

    _kit.py         AsyncKit, and what a test sees of rooms
    _plain.py       Kit: the same for tests without async
    _client.py      clients: WebSockets and HTTP requests
    errors.py       what a test is told
    _machine.py     one gateway and one host, the real ones, their deaths and successors
    _sockets.py     socket pairs in the place of TCP connections
    _keeper.py      the keeper, in memory
    _writer.py      commits without a thread
    _time.py        the virtual clock; chance from a seed
    _transcript.py  what has happened, for the text of a failure

Rooms run in the real `hibernation.host`, on real SQLite databases in a temporary folder, and their clients
are served by the real `broker.gateway`; only what lies around the two is another.
"""

from broker.testing._client import AsyncClient, Closed
from broker.testing._kit import AsyncKit, Errors, RoomView, virtual
from broker.testing._plain import Client, Kit
from broker.testing._response import Response
from broker.testing.errors import ConnectionOver, Expectation, HookFailed, NothingCame, Refused

__all__ = [
    "Kit",
    "Client",
    "AsyncKit",
    "AsyncClient",
    "virtual",
    "RoomView",
    "Response",
    "Closed",
    "Errors",
    # what a test is told
    "Expectation",
    "NothingCame",
    "ConnectionOver",
    "HookFailed",
    "Refused",
]
