"""The supervisor's line to a gateway: questions and orders over `gateway.sock`, one answer to each, in order.

Owns one connection, its deadlines, and the count of answers that are still owed: an order whose answer was
late may be followed by the next all the same. Decides nothing: that is `hibernation.handover`. Peer:
`broker.gateway.admin`. The command line's side of the same protocol, which blocks, is `hibernation.admin`.
"""

import os
import socket
import struct
from pathlib import Path
from typing import Any, Protocol

import trio

from hibernation.link import LinkError, StreamDecoder, encode
from storage.errors import BrokerError

__all__ = ["GatewayLine", "Line", "LineError"]

ANSWER_BYTES_MAX = 64 * 1024 * 1024
READ_BYTES = 64 * 1024

_PEER_CREDENTIALS = struct.Struct("3i")


class LineError(BrokerError):
    """The gateway refused an order, or could not be asked; the text says why."""

    def __init__(self, text: str, *, broken: bool) -> None:
        super().__init__(text)
        self.broken = broken
        """The line is of no more use: it is closed on the other side, or never was open."""


class Line(Protocol):
    """What a handover needs of a line; the tests have another."""

    @property
    def pid(self) -> int:
        """The process at the other end."""

    async def ask(self, command: str, within_seconds: float, **parameters: object) -> Any:
        """Give the answer to one order; LineError when it is refused, late, or the line is broken.

        Cancellation: the order may be carried out; its answer is passed over by the next `ask`.
        """

    async def aclose(self) -> None:
        """Close it."""


class GatewayLine:
    """The real one."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._answers = StreamDecoder(ANSWER_BYTES_MAX)
        self._owed = 0
        packed = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        self.pid, self._uid, _ = _PEER_CREDENTIALS.unpack(packed)  # unix(7): of whoever listened

    @classmethod
    async def connect(cls, path: Path, within_seconds: float) -> "GatewayLine":
        """Open a line to the gateway that listens at `path`. Raises LineError."""
        try:
            with trio.fail_after(within_seconds):
                stream = await trio.open_unix_socket(os.fspath(path))
                line = cls(stream)
                if line._uid not in (os.geteuid(), 0):
                    await stream.aclose()
                    raise LineError(
                        f"another user's process listens at {path} (uid {line._uid})", broken=True
                    )
                await stream.send_all(encode({"role": "admin"}))
        except (OSError, trio.BrokenResourceError) as error:
            raise LineError(f"the gateway cannot be reached at {path}: {error}", broken=True) from error
        except trio.TooSlowError:
            raise LineError(f"the gateway was not reached within {within_seconds:g} s", broken=True) from None
        return line

    async def ask(self, command: str, within_seconds: float, **parameters: object) -> Any:
        """See `Line`."""
        try:
            with trio.fail_after(within_seconds):
                await self._stream.send_all(encode({**parameters, "command": command}))
                self._owed += 1
                answer = await self._next_answer()
        except trio.TooSlowError:
            text = f"the gateway did not answer {command!r} within {within_seconds:g} s"
            raise LineError(text, broken=False) from None
        except (OSError, LinkError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise LineError(f"the gateway broke off at {command!r}: {error}", broken=True) from error
        if not isinstance(answer, dict):
            raise LineError(f"the gateway's answer to {command!r} is no map", broken=True)
        if "error" in answer:
            raise LineError(f"the gateway refused {command!r}: {answer['error']}", broken=False)
        return answer.get("result")

    async def _next_answer(self) -> Any:
        while True:
            for answer in self._answers:
                self._owed -= 1
                if not self._owed:
                    return answer
            data = await self._stream.receive_some(READ_BYTES)
            if not data:
                raise LinkError("it closed the connection")
            self._answers.feed(data)

    async def aclose(self) -> None:
        """Close it."""
        await trio.aclose_forcefully(self._stream)
