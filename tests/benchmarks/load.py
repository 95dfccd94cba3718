"""The client: very many raw WebSockets in one epoll set, in plain Python.

Owns the sockets and their handshakes. It is no WebSocket library: it sends ready-made frames, expects answers
of a known length, and answers pings, so that one process can carry more than the broker is asked to.
"""

import errno
import os
import select
import socket
import struct
from collections.abc import Iterable
from time import perf_counter

#: What is echoed and broadcast: 32 bytes of text.
MESSAGE = b"thirty-two bytes of text for you"
_MASK = b"\x37\xfa\x21\x3d"
_KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
#: RFC 6455, section 1.3, has both.
ANSWER_TO_KEY = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
_PONG = b"\x8a\x80" + _MASK
#: Half-open connections at a time: fewer than the listener's backlog, so that no SYN is dropped.
HANDSHAKES = 512
#: The kernel gives out about 28,000 ports for one pair of addresses, and keeps those of closed ones a while.
PER_ADDRESS = 15_500


def masked(payload: bytes) -> bytes:
    """A short text frame as a client sends it (RFC 6455, section 5.3)."""
    assert len(payload) < 126
    body = bytes(byte ^ _MASK[index & 3] for index, byte in enumerate(payload))
    return bytes((0x81, 0x80 | len(payload))) + _MASK + body


#: The message as it goes to the server, and as it comes back.
FRAME_IN = masked(MESSAGE)
FRAME_OUT = bytes((0x81, len(MESSAGE))) + MESSAGE


class Load:
    """Some thousands of connections to one server."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._epoll = select.epoll()
        self.sockets: dict[int, socket.socket] = {}
        #: Descriptors in the order in which they were opened.
        self.order: list[int] = []

    def __enter__(self) -> "Load":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every socket, without a closing handshake and without leaving ports in TIME_WAIT."""
        for sock in self.sockets.values():
            # RST instead of FIN: 15,000 ports in TIME_WAIT would be missing in the next benchmark.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        self.sockets.clear()
        self.order.clear()
        self._epoll.close()

    def open(self, targets: Iterable[str], window: int = HANDSHAKES) -> None:
        """Open a WebSocket for each target (`/parties/echo/room`); returns when all have their 101."""
        waiting = iter(targets)
        opening: dict[int, tuple[socket.socket, bytes]] = {}
        exhausted = False
        epoll = self._epoll
        head = (
            f" HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {_KEY.decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        while True:
            while not exhausted and len(opening) < window:
                target = next(waiting, None)
                if target is None:
                    exhausted = True
                    break
                sock = self._connect(len(self.order) + len(opening))
                opening[sock.fileno()] = (sock, f"GET {target}{head}".encode())
                epoll.register(sock.fileno(), select.EPOLLOUT)
            if not opening:
                return
            ready = epoll.poll(30)
            if not ready:
                raise RuntimeError(f"{len(opening)} handshakes are not answered")
            for descriptor, events in ready:
                if descriptor not in opening:
                    self._other(descriptor)
                    continue
                sock, request = opening[descriptor]
                if events & select.EPOLLOUT:
                    sock.send(request)
                    epoll.modify(descriptor, select.EPOLLIN)
                    continue
                answer = sock.recv(4096)
                if not answer.startswith(b"HTTP/1.1 101") or b"\r\n\r\n" not in answer:
                    raise RuntimeError(f"no WebSocket: {answer[:200]!r}")
                del opening[descriptor]
                self.sockets[descriptor] = sock
                self.order.append(descriptor)

    def _connect(self, index: int) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if index >= PER_ADDRESS:
            sock.bind((f"127.0.0.{1 + index // PER_ADDRESS}", 0))
        try:
            sock.connect(("127.0.0.1", self._port))
        except BlockingIOError:
            return sock
        except OSError as error:
            sock.close()
            if error.errno == errno.EADDRNOTAVAIL:
                # Not waited for here: it would count as the server's time.
                raise RuntimeError(
                    "another load holds the ports (TIME_WAIT): try again in a minute"
                ) from error
            raise
        return sock

    def _other(self, descriptor: int) -> bytes:
        """Data on an open connection: answer pings, give the rest."""
        sock = self.sockets[descriptor]
        data = sock.recv(65536)
        if not data:
            raise RuntimeError("the server closed a connection")
        return self._without_pings(sock, data) if data[0] == 0x89 else data

    @staticmethod
    def _without_pings(sock: socket.socket, data: bytes) -> bytes:
        while data[:1] == b"\x89":
            sock.send(_PONG)
            data = data[2 + data[1] :]
        return data

    def ping_pong(
        self, *, messages: int = 0, seconds: float = 0.0, frame: bytes = FRAME_IN, count: int | None = None
    ) -> int:
        """Send one message on each connection and the next one when its answer has come.

        Ends when each of the first `count` connections has had `messages` answers; or, with `seconds`, when
        they are over and every answer has come. Returns how many answers came.
        """
        order = self.order[:count]
        sockets, poll = self.sockets, self._epoll.poll
        size = len(FRAME_OUT)
        left = dict.fromkeys(order, messages)
        missing = dict.fromkeys(order, size)
        end = perf_counter() + seconds
        open_ended = not messages
        waiting = len(order)
        answers = 0
        for descriptor in order:
            sockets[descriptor].send(frame)
        while waiting:
            ready = poll(30)
            if not ready:
                raise RuntimeError(f"{waiting} connections wait for their answer")
            more = not open_ended or perf_counter() < end
            for descriptor, _ in ready:
                data = sockets[descriptor].recv(65536)
                if len(data) != size or data[0] != 0x81:
                    if not data:
                        raise RuntimeError("the server closed a connection")
                    data = self._without_pings(sockets[descriptor], data)
                    missing[descriptor] -= len(data)
                    if missing[descriptor] > 0:
                        continue
                    missing[descriptor] = size
                answers += 1
                if open_ended:
                    if more:
                        sockets[descriptor].send(frame)
                    else:
                        waiting -= 1
                    continue
                left[descriptor] -= 1
                if left[descriptor]:
                    sockets[descriptor].send(frame)
                else:
                    waiting -= 1
        return answers

    def probe(self, schedule: Iterable[tuple[float, int]]) -> list[float]:
        """Send a message at each time (seconds from now) on the connection of this index, whatever has
        become of the ones before, and give the seconds from that time to the answer.

        The times are those of the schedule, not of the sends: a late send counts as latency.
        """
        began = perf_counter()
        sockets, order = self.sockets, self.order
        sent: dict[int, list[float]] = {}
        latencies: list[float] = []
        waiting = 0
        upcoming = iter(schedule)
        following = next(upcoming, None)
        descriptor_of_epoll = self._epoll.fileno()
        while following is not None or waiting:
            now = perf_counter() - began
            while following is not None and following[0] <= now:
                descriptor = order[following[1]]
                sent.setdefault(descriptor, []).append(following[0])
                sockets[descriptor].send(FRAME_IN)
                waiting += 1
                following = next(upcoming, None)
            # select(2) waits in microseconds where epoll_wait(2) counts milliseconds.
            pause = 5.0 if following is None else max(0.0, following[0] - (perf_counter() - began))
            if not select.select([descriptor_of_epoll], [], [], pause)[0]:
                if following is None:
                    raise RuntimeError(f"{waiting} probes are not answered")
                continue
            for descriptor, _ in self._epoll.poll(0):
                data = self._other(descriptor)
                arrived = perf_counter() - began
                for _ in range(len(data) // len(FRAME_OUT)):
                    latencies.append(arrived - sent[descriptor].pop(0))
                    waiting -= 1
        return latencies

    def collect(self, sender: int, frame: bytes, received_bytes: int, rounds: int) -> None:
        """Send `frame` on the connection of this index and read on all until so many bytes have come in all;
        so many times.
        """
        for _ in range(rounds):
            self.sockets[self.order[sender]].send(frame)
            missing = received_bytes
            while missing > 0:
                ready = self._epoll.poll(30)
                if not ready:
                    raise RuntimeError(f"{missing} bytes of a broadcast are missing")
                for descriptor, _ in ready:
                    missing -= len(self._other(descriptor))

    def trigger(self, sender: int, rounds: int, window: int) -> None:
        """Send messages on the connection of this index, `window` at a time, each when a copy of an earlier
        one comes back.
        """
        descriptor = self.order[sender]
        sock, size = self.sockets[descriptor], len(FRAME_OUT)
        received, sent = 0, min(window, rounds)
        sock.send(FRAME_IN * sent)
        while received < rounds * size:
            if not self._epoll.poll(30):
                raise RuntimeError("a broadcast does not come back")
            received += len(self._other(descriptor))
            due = min(window + received // size, rounds) - sent
            if due > 0:
                sock.send(FRAME_IN * due)
                sent += due

    def idle(self, seconds: float) -> None:
        """Answer pings for a while."""
        end = perf_counter() + seconds
        while (left := end - perf_counter()) > 0:
            for descriptor, _ in self._epoll.poll(left):
                self._other(descriptor)


class Audience:
    """A process of its own that opens connections and counts the bytes that come: who listens to a
    broadcast. It reads in the same way whoever sends.
    """

    def __init__(self, port: int, targets: list[str]) -> None:
        orders, self._orders = os.pipe()
        self._reports, reports = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            code = 1
            try:
                os.close(self._orders)
                os.close(self._reports)
                _listen(port, targets, orders, reports)
                code = 0
            except Exception:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(orders)
        os.close(reports)
        self._read()  # all are connected

    def __enter__(self) -> "Audience":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._orders)
        os.close(self._reports)
        os.waitpid(self._pid, 0)

    def expect(self, received_bytes: int) -> None:
        """Tell it to report when this many bytes have come in all, counted from now."""
        os.write(self._orders, struct.pack("Q", received_bytes))

    def wait(self) -> None:
        """Wait for that report."""
        self._read()

    def _read(self) -> None:
        if not os.read(self._reports, 8):
            raise RuntimeError("the audience has failed")


def _listen(port: int, targets: list[str], orders: int, reports: int) -> None:
    load = Load(port)
    load.open(targets)
    epoll = load._epoll
    epoll.register(orders, select.EPOLLIN)
    os.write(reports, b"opened..")
    expected, received = 0, 0
    sockets = load.sockets
    buffer = bytearray(65536)
    while True:
        for descriptor, _ in epoll.poll():
            if descriptor == orders:
                order = os.read(orders, 8)
                if not order:
                    load.close()
                    return
                expected += struct.unpack("Q", order)[0]
            else:
                received += sockets[descriptor].recv_into(buffer)
        if expected and received >= expected:
            assert received == expected, "more came than was sent"
            expected = received = 0
            os.write(reports, b"complete")
