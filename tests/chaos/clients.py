"""The clients of a run: very many raw WebSockets in one epoll set, writing down all they do and read.

Owns sockets, handshakes, what is sent when, and the lines of `clients.jsonl`. It knows nothing of kills: a
handshake that fails is tried again under another name, and everything else that goes wrong is only written
down. Plain epoll and not a task per connection, because 2,000 of them have to leave the machine to the broker
(about 25 µs a frame instead of 150). Peers: `app` on the other side, `checker` afterwards.

As a process of its own (`python -m tests.chaos.clients OPTIONS`, JSON) it runs until its standard input says
`finish` or ends; then it waits for what is under way, has each connection send its last message, closes all,
asks each room for its truth, and exits with 0.
"""

import contextlib
import errno
import heapq
import json
import os
import random
import select
import socket
import struct
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.chaos.history import CLIENTS, Log
from tests.e2e.raw_client import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, encode_frame

__all__ = ["Clients", "Options"]

TAGS = ("a", "b", "c")
#: A large message, and a large answer: beyond what a receive buffer keeps, within an outbox.
LARGE_BYTES = 200 * 1024
#: Half-open connections at a time.
HANDSHAKES = 256
#: How often the clients' part is done that no socket asks for.
TICK_SECONDS = 0.01
RETRY_SECONDS = (0.05, 0.5)
_KEY = "dGhlIHNhbXBsZSBub25jZQ=="


@dataclass
class Options:
    """What is to be driven, and how hard."""

    port: int
    folder: str
    """Where `clients.jsonl` goes."""
    connections: int = 60
    rooms: int = 6
    rate: float = 200.0
    """Messages a second, of all clients together."""
    churn: float = 2.0
    """Connections a second that leave and are replaced."""
    window: int = 12
    """Messages of one connection that may be unanswered."""
    large: float = 0.01
    """Which part of the messages, and of the answers, is large."""
    messages: int = 0
    """Finish after so many messages; 0: when told to."""
    seed: int = 1
    prefix: str = "r"
    """Rooms are called so, with a number."""
    handshake_seconds: float = 20.0
    finish_seconds: float = 90.0
    """How long what is under way may take at the end."""

    def to_json(self) -> str:
        """Give them as the command line of the process."""
        return json.dumps(asdict(self))


class _Client:
    """One connection."""

    __slots__ = (
        "answered",
        "asked_at",
        "head",
        "incoming",
        "kinds",
        "large",
        "leaving",
        "name",
        "number",
        "open",
        "outgoing",
        "parts",
        "resident",
        "room",
        "sock",
        "then",
        "watched",
    )

    def __init__(self, name: str, room: str, resident: int) -> None:
        self.name = name
        self.room = room
        #: Which of the places in the crowd it has: who leaves is followed by another in the same room.
        self.resident = resident
        self.sock: socket.socket
        self.head = b""
        self.asked_at = 0.0
        self.open = False
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.watched = 0
        self.number = 0
        self.answered = 0
        self.kinds: dict[int, Any] = {}
        self.large = False
        self.parts = bytearray()
        self.leaving = ""
        self.then: Callable[[], None] | None = None


class Clients:
    """See the module. `run` is called once."""

    def __init__(self, options: Options, orders: int | None = None) -> None:
        """`orders`: a descriptor that says `finish`, or ends; None: finish after `messages`."""
        self._options = options
        self._orders = orders
        self._chance = random.Random(options.seed)
        self._log = Log(Path(options.folder) / CLIENTS)
        self._epoll = select.epoll()
        self._clients: dict[int, _Client] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_number = 0
        self._names = 0
        self._opening = 0
        self._waiting_to_open: list[int] = []
        self._sent = 0
        self._finishing = False
        #: Some time ago's connections, to draw from.
        self._drawn: list[_Client] = []
        self._draws = 0
        #: Room and connection of all that were ever asked for.
        self._known: dict[str, list[str]] = {}
        self._opened: set[tuple[str, str]] = set()

    def run(self) -> bool:
        """Drive the clients to the end of the run; False when not everything came to its end."""
        options, log = self._options, self._log
        with log:
            self._waiting_to_open = list(range(options.connections))
            if self._orders is not None:
                self._epoll.register(self._orders, select.EPOLLIN)
            budget, last = 0.0, time.monotonic()
            churn = 0.0
            while not self._finishing:
                self._turn()
                now = time.monotonic()
                budget = min(budget + (now - last) * options.rate, options.rate)
                churn += (now - last) * options.churn
                last = now
                while budget >= 1:
                    budget -= max(1, self._burst())
                while churn >= 1:
                    churn -= 1
                    self._somebody_leaves()
                if options.messages and self._sent >= options.messages:
                    break
            done = self._finish()
            used = time.process_time()
            log.add("client", "", "", 0, "finish" if done else "unfinished", {"cpu_seconds": round(used, 2)})
        for client in list(self._clients.values()):
            client.sock.close()
        self._epoll.close()
        return done

    # --- The loop ---------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Open whom there is room for, read what has come, and do what is due."""
        while self._waiting_to_open and self._opening < HANDSHAKES and not self._finishing:
            self._connect(self._waiting_to_open.pop())
        for descriptor, events in self._epoll.poll(TICK_SECONDS):
            client = self._clients.get(descriptor)
            if client is not None:
                self._ready(client, events)
            elif descriptor == self._orders:
                self._finishing = True
                self._epoll.unregister(descriptor)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            heapq.heappop(self._timers)[2]()

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer_number += 1
        heapq.heappush(self._timers, (time.monotonic() + seconds, self._timer_number, action))

    def _watch(self, client: _Client, events: int) -> None:
        if client.watched != events:
            if client.watched:
                self._epoll.modify(client.sock.fileno(), events)
            else:
                self._epoll.register(client.sock.fileno(), events)
            client.watched = events

    # --- Coming -----------------------------------------------------------------------------------

    def _connect(self, resident: int) -> None:
        options, chance = self._options, self._chance
        self._names += 1
        room = f"{options.prefix}{resident % options.rooms}"
        client = _Client(f"c{resident}.{self._names}", room, resident)
        tags = sorted(chance.sample(TAGS, chance.choice((0, 1, 1, 2))))
        plain = chance.random() < 0.5
        address = f"/party/{room}?_pk={client.name}&tags={'.'.join(tags)}" + ("&plain=1" if plain else "")
        client.head = (
            f"GET {address} HTTP/1.1\r\nHost: 127.0.0.1:{options.port}\r\nUpgrade: websocket\r\n"
            f"Connection: Upgrade\r\nSec-WebSocket-Key: {_KEY}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
        client.sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._known.setdefault(room, []).append(client.name)
        client.asked_at = self._log.add(
            "client", room, client.name, 0, "connect", {"tags": tags, "plain": plain}
        )
        self._clients[client.sock.fileno()] = client
        self._opening += 1
        with contextlib.suppress(BlockingIOError):
            client.sock.connect(("127.0.0.1", options.port))
        client.outgoing += client.head
        self._watch(client, select.EPOLLOUT | select.EPOLLIN)
        self._after(options.handshake_seconds, lambda: self._refused(client, "no answer"))

    def _refused(self, client: _Client, reason: str) -> None:
        """No WebSocket came of it: another is tried, under another name."""
        if self._clients.get(client.sock.fileno()) is not client or client.open:
            return
        self._log.add("client", client.room, client.name, 0, "refused", reason)
        self._opening -= 1
        self._forget(client, reset=True)
        if not self._finishing:
            self._after(
                self._chance.uniform(*RETRY_SECONDS), lambda: self._waiting_to_open.append(client.resident)
            )

    def _forget(self, client: _Client, *, reset: bool = False) -> None:
        del self._clients[client.sock.fileno()]
        if client.watched:
            self._epoll.unregister(client.sock.fileno())
        if reset:
            client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sock.close()

    # --- What epoll says --------------------------------------------------------------------------

    def _ready(self, client: _Client, events: int) -> None:
        if events & select.EPOLLOUT:
            self._flush(client)
            if self._clients.get(client.sock.fileno()) is not client:
                return
        if not events & ~select.EPOLLOUT:
            return
        try:
            data = client.sock.recv(262_144)
        except BlockingIOError:
            return
        except OSError as error:
            self._gone(client, errno.errorcode.get(error.errno or 0, "error"))
            return
        if not data:
            self._gone(client, "eof")
            return
        client.incoming += data
        if not client.open and not self._answered(client):
            return
        self._frames(client)

    def _answered(self, client: _Client) -> bool:
        """Read the head of the answer to the handshake; True when it is a WebSocket now."""
        end = client.incoming.find(b"\r\n\r\n")
        if end < 0:
            return False
        status = client.incoming[:end].split(b"\r\n")[0].decode("latin-1")
        if " 101 " not in f"{status} ":
            self._refused(client, status)
            return False
        del client.incoming[: end + 4]
        self._opening -= 1
        client.open = True
        self._opened.add((client.room, client.name))
        self._log.add("client", client.room, client.name, 0, "open")
        return True

    def _gone(self, client: _Client, how: str) -> None:
        if not client.open:
            self._refused(client, how)
            return
        self._ended(client, how, 1006)

    def _ended(self, client: _Client, how: str, code: int) -> None:
        self._log.add("client", client.room, client.name, 0, "end", [how, code])
        self._forget(client)
        self._replace(client)

    def _replace(self, client: _Client) -> None:
        if not self._finishing:
            self._after(
                self._chance.uniform(*RETRY_SECONDS), lambda: self._waiting_to_open.append(client.resident)
            )

    def _frames(self, client: _Client) -> None:
        data = client.incoming
        at = 0
        while len(data) - at >= 2:
            size, head = data[at + 1], 2
            if size & 0x80:
                self._log.add("client", client.room, client.name, 0, "frame", ["?", "a masked frame"])
                break
            if size == 126:
                if len(data) - at < 4:
                    break
                size, head = int.from_bytes(data[at + 2 : at + 4], "big"), 4
            elif size == 127:
                if len(data) - at < 10:
                    break
                size, head = int.from_bytes(data[at + 2 : at + 10], "big"), 10
            if len(data) - at < head + size:
                break
            first = data[at]
            payload = bytes(data[at + head : at + head + size])
            at += head + size
            if not self._frame(client, first & 0xF, bool(first & 0x80), payload):
                return
        del data[:at]

    def _frame(self, client: _Client, opcode: int, fin: bool, payload: bytes) -> bool:
        """One frame has come; False when it was the last."""
        if opcode in (TEXT, BINARY, CONTINUATION):
            if fin and not client.parts:
                self._message(client, payload)
            else:
                client.parts += payload
                if fin:
                    whole, client.parts = bytes(client.parts), bytearray()
                    self._message(client, whole)
            return True
        if opcode == PING:
            self._write(client, encode_frame(PONG, payload))
            return True
        if opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
            if client.leaving != "close":
                with contextlib.suppress(OSError):
                    client.sock.send(encode_frame(CLOSE, payload[:2]))
            self._ended(client, "close", code)
            return False
        if opcode != PONG:
            self._log.add("client", client.room, client.name, 0, "frame", ["?", f"opcode {opcode}"])
        return True

    def _message(self, client: _Client, payload: bytes) -> None:
        now = time.monotonic()
        text = ""
        try:
            text = payload.decode()
            frame = json.loads(text)
            kind = frame[0]
            number = frame[1] if kind in "bcefLlpstx" else 0
            if kind in "eL":
                _, _, token, body = frame
                repeats = client.kinds.get(number, (0, 0))[1]
                whole = body == token * repeats
                text = json.dumps([kind, number, token, len(body), int(whole)], separators=(",", ":"))
            elif kind == "l":
                expected = client.kinds.get(number, (0, 0))[1]
                text = json.dumps([kind, number, frame[2], int(frame[3] == expected)], separators=(",", ":"))
        except (ValueError, IndexError, TypeError):
            shown = payload[:60].decode("latin-1")
            self._log.add("client", client.room, client.name, 0, "frame", ["?", len(payload), shown])
            return
        self._log.raw(now, "client", client.room, client.name, number, "frame", text)
        if number > client.answered:
            client.answered = number
            sent = client.kinds.pop(number, None)
            if sent is not None and sent[0] in "lL":
                client.large = False

    # --- Sending ----------------------------------------------------------------------------------

    def _write(self, client: _Client, data: bytes) -> None:
        client.outgoing += data
        self._flush(client)

    def _flush(self, client: _Client) -> None:
        if client.outgoing:
            try:
                sent = client.sock.send(client.outgoing)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                # What has come before is still to be read: the end shows there.
                client.outgoing.clear()
                if not client.open:
                    self._refused(client, errno.errorcode.get(error.errno or 0, "error"))
                    return
                sent = 0
            del client.outgoing[:sent]
        self._watch(client, select.EPOLLIN | (select.EPOLLOUT if client.outgoing else 0))
        if not client.outgoing and client.then is not None:
            then, client.then = client.then, None
            then()

    def _anybody(self) -> _Client | None:
        """Some connection that is open and not leaving."""
        clients = self._clients
        if not clients:
            return None
        for _ in range(8):
            # Descriptors are dense enough to be drawn from, and a list of the open ones costs more.
            client = self._chance.choice(self._order())
            if client.open and not client.leaving:
                return client
        return None

    def _order(self) -> list[_Client]:
        if len(self._clients) != len(self._drawn) or self._draws > 256:
            self._drawn = list(self._clients.values())
            self._draws = 0
        self._draws += 1
        return self._drawn

    def _burst(self) -> int:
        """Have somebody send some messages at once, as many as its window allows; returns how many."""
        client = self._anybody()
        if client is None or self._clients.get(client.sock.fileno()) is not client:
            return 0
        free = self._options.window - (client.number - client.answered)
        count = min(free, self._chance.choice((1, 1, 2, 3, 4, 6)))
        data = bytearray()
        for _ in range(count):
            data += self._next_message(client)
        if data:
            self._write(client, bytes(data))
        return count

    def _next_message(self, client: _Client, kind: str = "") -> bytes:
        """One message, written down and put into frames."""
        chance = self._chance
        if not kind:
            if chance.random() < self._options.large and not client.large:
                kind = chance.choice("lL")
                client.large = True
            else:
                kind = chance.choice("eeeesspppcccccccbbt")
        client.number = number = client.number + 1
        expected: Any = 0
        noted: list[Any] = [kind]
        message: list[Any] = [kind, number]
        match kind:
            case "e":
                expected = chance.choice((0, 1, 2, 7, 8, 60))
                message.append(expected)
            case "L":
                expected = LARGE_BYTES // 16
                message.append(expected)
            case "l":
                text = chance.randbytes(32).hex() * (LARGE_BYTES // 64)
                expected = zlib.crc32(text.encode())
                message.append(text)
            case "p" | "b":
                tag = chance.choice(TAGS)
                message.append(tag)
                noted.append(tag)
            case "t":
                tags = sorted(chance.sample(TAGS, chance.choice((0, 1, 1, 2))))
                message.append(tags)
                noted.append(tags)
        client.kinds[number] = (kind, expected)
        self._sent += 1
        self._log.add("client", client.room, client.name, number, "send", noted)
        payload = json.dumps(message, separators=(",", ":")).encode()
        opcode = BINARY if chance.random() < 0.2 else TEXT
        if chance.random() < 0.9:
            return encode_frame(opcode, payload, mask=chance.randbytes(4))
        cuts = sorted(chance.sample(range(len(payload) + 1), 2))
        parts = [payload[: cuts[0]], payload[cuts[0] : cuts[1]], payload[cuts[1] :]]
        frames = [
            encode_frame(CONTINUATION if index else opcode, part, fin=index == 2, mask=chance.randbytes(4))
            for index, part in enumerate(parts)
        ]
        if chance.random() < 0.3:
            frames.insert(1, encode_frame(PING, b"?"))
        return b"".join(frames)

    # --- Leaving ----------------------------------------------------------------------------------

    def _somebody_leaves(self) -> None:
        client = self._anybody()
        if client is None or self._clients.get(client.sock.fileno()) is not client:
            return
        # Some leave in the middle of something, some have asked the room to close them.
        how = self._chance.choice(("close", "close", "reset", "half", "x"))
        if self._chance.random() < 0.7:
            self._write(client, b"".join(self._next_message(client) for _ in range(2)))
            if self._clients.get(client.sock.fileno()) is not client:
                return
        if how == "x":
            client.leaving = "x"
            self._write(client, self._next_message(client, "x"))
        else:
            self._leave(client, how)

    def _leave(self, client: _Client, how: str) -> None:
        client.leaving = how
        if how == "reset":
            # Up to here it has a claim; what has come and was not read is nobody's.
            self._log.add("client", client.room, client.name, 0, "leave", how)
            self._forget(client, reset=True)
            self._replace(client)
            return
        if how == "close":
            self._log.add("client", client.room, client.name, 0, "leave", how)
            self._write(client, encode_frame(CLOSE, struct.pack(">H", 1000) + b"bye"))
            return

        def shut() -> None:
            self._log.add("client", client.room, client.name, 0, "leave", how)
            with contextlib.suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)

        if client.outgoing:
            client.then = shut
        else:
            shut()

    # --- The end ----------------------------------------------------------------------------------

    def _until(self, condition: Callable[[], bool], deadline: float) -> bool:
        while not condition():
            if time.monotonic() > deadline:
                return False
            self._turn()
        return True

    def _finish(self) -> bool:
        """Let everything under way come to its end; False when it does not in time."""
        self._finishing = True
        deadline = time.monotonic() + self._options.finish_seconds

        def quiet() -> bool:
            return all(
                client.open and (client.leaving != "" or client.answered == client.number)
                for client in self._clients.values()
            )

        done = self._until(quiet, deadline)
        staying = [client for client in self._clients.values() if client.open and not client.leaving]
        for client in staying:
            if self._clients.get(client.sock.fileno()) is client:
                self._write(client, self._next_message(client, "f"))
        done = self._until(quiet, deadline) and done
        for client in staying:
            if self._clients.get(client.sock.fileno()) is client:
                if client.answered == client.number:
                    self._leave(client, "close")
                else:
                    # It waits in vain: no leave, so that the checker sees what it is owed.
                    self._forget(client)
        done = self._until(lambda: not self._clients, deadline) and done
        for client in list(self._clients.values()):
            self._log.add("client", client.room, client.name, 0, "stuck", client.leaving)
            self._forget(client)
        return self._ask_rooms(deadline) and done

    def _ask_rooms(self, deadline: float) -> bool:
        """Write down the truth of each room, when every close turn has run or the time is over."""
        done = True
        for room, names in sorted(self._known.items()):
            opened = [name for name in names if (room, name) in self._opened]
            while True:
                told = self._truth(room)
                if told is not None:
                    settled = all(name in told["x"] for name in opened)
                    settled = (
                        settled and all(name in told["x"] for name in told["k"]) and not told["connected"]
                    )
                    if settled or time.monotonic() > deadline:
                        break
                elif time.monotonic() > deadline:
                    break
                time.sleep(0.1)
            if told is None:
                done = False
            else:
                self._log.add("truth", room, "", 0, "truth", told)
        return done

    def _truth(self, room: str) -> dict[str, Any] | None:
        try:
            address = f"http://127.0.0.1:{self._options.port}/party/{room}"
            with urllib.request.urlopen(address, timeout=10) as answer:
                told: dict[str, Any] = json.load(answer)
                return told
        except (OSError, ValueError, urllib.error.URLError):
            return None


def main() -> None:
    """Run as a process of its own."""
    options = Options(**json.loads(sys.argv[1]))
    os.set_blocking(0, True)
    sys.exit(0 if Clients(options, orders=0).run() else 1)


if __name__ == "__main__":
    main()
