"""Requests over HTTP on kept-alive connections."""

import select
import socket
from time import perf_counter

from tests.benchmarks.figures import Figure, middle
from tests.benchmarks.running import Broker, Floor, stopwatch

NAME = "http"
CONNECTIONS = 16


def run(quick: bool) -> list[Figure]:
    seconds, rounds = (0.5, 1) if quick else (2.0, 3)
    with Broker() as broker, Floor("quart") as quart, Floor("http") as bare:
        rates: list[float] = []
        gateway_us: list[float] = []
        host_us: list[float] = []
        quart_rates: list[float] = []
        quart_us: list[float] = []
        bare_rates: list[float] = []
        bare_us: list[float] = []
        for port in (broker.port, quart.port, bare.port):
            _get(port, "/parties/page/room", 0.2)
        for _ in range(rounds):
            for floor, floor_rates, floor_us in ((quart, quart_rates, quart_us), (bare, bare_rates, bare_us)):
                before = floor.cpu_us()
                with stopwatch() as watch:
                    answers = _get(floor.port, "/parties/page/room", seconds)
                floor_us.append((floor.cpu_us() - before) / answers)
                floor_rates.append(answers / watch.seconds)
            used = broker.usage()
            with stopwatch() as watch:
                answers = _get(broker.port, "/parties/page/room", seconds)
            used = broker.usage() - used
            rates.append(answers / watch.seconds)
            gateway_us.append(used.gateway / answers)
            host_us.append(used.host / answers)
    return [
        Figure(
            NAME,
            "GET of a hibernating room",
            middle(rates),
            "requests/s",
            wanted="over",
            floor=middle(quart_rates),
            floor_name="hypercorn and quart-trio alone",
            notes={"connections": CONNECTIONS, "bare epoll": middle(bare_rates)},
        ),
        Figure(
            NAME,
            "GET of a hibernating room",
            middle(map(sum, zip(gateway_us, host_us, strict=True))),
            "µs CPU/request",
            floor=middle(quart_us),
            floor_name="hypercorn and quart-trio alone",
            notes={
                "gateway": middle(gateway_us),
                "host": middle(host_us),
                "bare epoll": middle(bare_us),
            },
        ),
    ]


def _get(port: int, target: str, seconds: float) -> int:
    """Ask for it on each connection, again when the answer has come; how many answers came."""
    request = f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    epoll = select.epoll()
    sockets = {}
    for _ in range(CONNECTIONS):
        sock = socket.create_connection(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        epoll.register(sock.fileno(), select.EPOLLIN)
        sockets[sock.fileno()] = sock
    received = dict.fromkeys(sockets, b"")
    end = perf_counter() + seconds
    waiting, answers = len(sockets), 0
    try:
        for sock in sockets.values():
            sock.sendall(request)
        while waiting:
            ready = epoll.poll(30)
            if not ready:
                raise RuntimeError(f"{waiting} requests are not answered")
            for descriptor, _ in ready:
                sock = sockets[descriptor]
                data = sock.recv(65536)
                text = received[descriptor] + data
                if not data:
                    raise RuntimeError(f"the server closed the connection after {text!r}")
                if not _is_whole(text):
                    received[descriptor] = text
                    continue
                received[descriptor] = b""
                answers += 1
                if perf_counter() < end:
                    sock.sendall(request)
                else:
                    waiting -= 1
    finally:
        for sock in sockets.values():
            sock.close()
        epoll.close()
    return answers


def _is_whole(text: bytes) -> bool:
    head, separator, body = text.partition(b"\r\n\r\n")
    if not separator:
        return False
    if not head.startswith(b"HTTP/1.1 200"):
        raise RuntimeError(f"not the answer that was asked for: {text!r}")
    lowered = head.lower()
    if b"transfer-encoding: chunked" in lowered:
        return body.endswith(b"0\r\n\r\n")
    start = lowered.index(b"content-length:") + 15
    return len(body) >= int(lowered[start:].split(b"\r\n", 1)[0])
