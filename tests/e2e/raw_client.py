"""A WebSocket client that may break every rule: a plain blocking socket with deadlines.

Owns no knowledge of what is right: it writes frames as it is told to (RFC 6455, section 5.2) and reads what
comes, without answering pings or Close frames by itself. Its peer is the gateway under test.
"""

import base64
import hashlib
import os
import select
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Self

__all__ = [
    "BINARY",
    "CLOSE",
    "CONTINUATION",
    "PING",
    "PONG",
    "TEXT",
    "Answer",
    "RawClient",
    "encode_frame",
]

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def encode_frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, mask: bool | bytes = True, rsv: int = 0
) -> bytes:
    """One frame. `mask` is False (which a client must not), True (a random key), or the key."""
    head = bytearray([(0x80 if fin else 0) | rsv << 4 | opcode])
    masked = 0 if mask is False else 0x80
    if len(payload) < 126:
        head.append(masked | len(payload))
    elif len(payload) < 1 << 16:
        head += struct.pack(">BH", masked | 126, len(payload))
    else:
        head += struct.pack(">BQ", masked | 127, len(payload))
    if not masked:
        return bytes(head) + payload
    key = mask if isinstance(mask, bytes) else os.urandom(4)
    if not payload:
        return bytes(head) + key
    repeated = (key * (len(payload) // 4 + 1))[: len(payload)]
    mixed = int.from_bytes(payload, "big") ^ int.from_bytes(repeated, "big")
    return bytes(head) + key + mixed.to_bytes(len(payload), "big")


@dataclass
class Answer:
    """The head of what the server answers to a handshake, and its body if that is no upgrade."""

    status: int
    headers: dict[str, str]
    body: bytes


class RawClient:
    """One TCP connection to the broker; a context manager that closes it.

    Every wait has a deadline of `timeout_seconds`; TimeoutError says that nothing came.
    """

    def __init__(self, port: int, host: str = "127.0.0.1", *, timeout_seconds: float = 20.0) -> None:
        self.timeout_seconds = timeout_seconds
        self.sock = socket.create_connection((host, port), timeout_seconds)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._port = port
        self._received = bytearray()
        self._ended = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def local_port(self) -> int:
        """The client's own port, by which the kernel's tables tell the connection."""
        port: int = self.sock.getsockname()[1]
        return port

    def close(self) -> None:
        """Close the socket, without a Close frame."""
        self.sock.close()

    def reset(self) -> None:
        """Close the socket with a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def shutdown(self) -> None:
        """End our direction (FIN); what the server sends can still be read."""
        self.sock.shutdown(socket.SHUT_WR)

    # --- Handshake

    def send_handshake(
        self,
        path: str = "/party/room",
        headers: Mapping[str, str | None] | None = None,
        *,
        raw: bytes | None = None,
    ) -> str:
        """Write the request of an upgrade and return its key.

        `headers` replaces the usual ones by lower-case name, None leaves one out; `raw` is written as it is.
        """
        key = base64.b64encode(os.urandom(16)).decode()
        if raw is None:
            fields: dict[str, str | None] = {
                "host": f"127.0.0.1:{self._port}",
                "upgrade": "websocket",
                "connection": "Upgrade",
                "sec-websocket-key": key,
                "sec-websocket-version": "13",
                **(headers or {}),
            }
            lines = [f"GET {path} HTTP/1.1"]
            lines += [f"{name}: {value}" for name, value in fields.items() if value is not None]
            raw = "\r\n".join([*lines, "", ""]).encode("latin-1")
        self.send_bytes(raw)
        return key

    def receive_answer(self) -> Answer:
        """Read the answer's head, and its body if its status is not 101."""
        while b"\r\n\r\n" not in self._received:
            self._receive_some()
        head, _, rest = bytes(self._received).partition(b"\r\n\r\n")
        self._received[:] = rest
        status_line, *lines = head.decode("latin-1").split("\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        status = int(status_line.split()[1])
        body = b"" if status == 101 else self.receive_bytes(int(headers.get("content-length", "0")))
        return Answer(status, headers, body)

    def handshake(
        self,
        path: str = "/party/room",
        headers: Mapping[str, str | None] | None = None,
        *,
        raw: bytes | None = None,
        expect: int = 101,
    ) -> Answer:
        """Ask for an upgrade and read the answer, whose status must be `expect`."""
        key = self.send_handshake(path, headers, raw=raw)
        answer = self.receive_answer()
        assert answer.status == expect, answer
        if expect == 101 and raw is None:
            # RFC 6455, section 4.2.2, step 5.4.
            accept = base64.b64encode(hashlib.sha1(key.encode() + _GUID).digest()).decode()
            assert answer.headers["sec-websocket-accept"] == accept
        return answer

    # --- Frames

    def send_frame(
        self,
        opcode: int,
        payload: bytes | str = b"",
        *,
        fin: bool = True,
        mask: bool | bytes = True,
        rsv: int = 0,
    ) -> None:
        """Write one frame."""
        data = payload.encode() if isinstance(payload, str) else payload
        self.send_bytes(encode_frame(opcode, data, fin=fin, mask=mask, rsv=rsv))

    def send(self, message: str | bytes) -> None:
        """Write one message as one frame: text for str, binary for bytes."""
        self.send_frame(TEXT if isinstance(message, str) else BINARY, message)

    def send_close(self, code: int | None = 1000, reason: str = "") -> None:
        """Write a Close frame; None leaves its body empty."""
        self.send_frame(CLOSE, b"" if code is None else struct.pack(">H", code) + reason.encode())

    def send_bytes(self, raw: bytes) -> None:
        """Write bytes as they are. The deadline is that of each step: many bytes may take longer."""
        left = memoryview(raw)
        while left:
            left = left[self.sock.send(left) :]

    def receive_frame(self) -> tuple[int, bytes]:
        """The next frame: opcode and payload. A server's frames are unmasked and, here, never fragments."""
        first, second = self.receive_bytes(2)
        assert first & 0x80, "a fragment"
        assert not first & 0x70, "reserved bits"
        assert not second & 0x80, "masked by a server"
        length = second
        if length == 126:
            (length,) = struct.unpack(">H", self.receive_bytes(2))
            assert length >= 126
        elif length == 127:
            (length,) = struct.unpack(">Q", self.receive_bytes(8))
            assert length >= 1 << 16
        return first & 0x0F, self.receive_bytes(length)

    def receive(self) -> str | bytes:
        """The next message. Pings of the server are answered on the way."""
        while True:
            opcode, payload = self.receive_frame()
            if opcode == PING:
                self.send_frame(PONG, payload)
            elif opcode == TEXT:
                return payload.decode()
            else:
                assert opcode == BINARY, (opcode, payload)
                return payload

    def expect_close(self) -> tuple[int | None, str]:
        """The code (None: without one) and reason of the Close frame, which must be the next frame."""
        opcode, payload = self.receive_frame()
        assert opcode == CLOSE, (opcode, payload)
        if not payload:
            return None, ""
        (code,) = struct.unpack(">H", payload[:2])
        return code, payload[2:].decode()

    # --- Bytes

    def receive_bytes(self, length: int) -> bytes:
        """Exactly so many bytes; EOFError if the server ends before."""
        while len(self._received) < length:
            self._receive_some()
        data = bytes(self._received[:length])
        del self._received[:length]
        return data

    def at_eof(self) -> bool:
        """Wait for the end of the connection: True when it comes, False when bytes come instead."""
        if self._received:
            return False
        try:
            self._receive_some()
        except (EOFError, ConnectionResetError):
            return True
        return False

    def is_silent(self, seconds: float = 0.0) -> bool:
        """Whether nothing, the end included, comes within `seconds`."""
        return not self._received and not select.select([self.sock], [], [], seconds)[0]

    def _receive_some(self) -> None:
        if self._ended:
            raise EOFError("the server has ended the connection")
        self.sock.settimeout(self.timeout_seconds)
        data = self.sock.recv(1 << 18)
        if not data:
            self._ended = True
            raise EOFError(f"the server has ended the connection after {bytes(self._received)!r}")
        self._received += data
