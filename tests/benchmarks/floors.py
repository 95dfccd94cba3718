"""The least that could be done: one process, one epoll set, no protocol beyond what the client waits for.

`python -m tests.benchmarks.floors KIND` prints `floor on http://HOST:PORT` and serves until SIGTERM:

    echo       answers an upgrade with a constant 101; then a constant frame for each that comes
    broadcast  the same handshake; then whatever one client sends goes to all, with `send` in a plain loop
    http       answers whatever comes with a constant response
    quart      hypercorn's trio server and a quart-trio app of one line, as the packages give them
"""

import select
import socket
import sys

from tests.benchmarks.load import ANSWER_TO_KEY, FRAME_IN, FRAME_OUT

_HANDSHAKE = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + ANSWER_TO_KEY + b"\r\n\r\n"
)
_RESPONSE = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 5\r\n\r\nhello"


def serve(kind: str) -> None:
    """Serve for ever."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    listener.setblocking(False)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
    print(f"floor on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    epoll = select.epoll()
    epoll.register(listener, select.EPOLLIN)
    listening = listener.fileno()
    sockets: dict[int, socket.socket] = {}
    open_sockets: dict[int, socket.socket] = {}
    while True:
        for descriptor, _ in epoll.poll():
            if descriptor == listening:
                try:
                    for _ in range(128):
                        sock, _address = listener.accept()
                        sock.setblocking(False)
                        sockets[sock.fileno()] = sock
                        epoll.register(sock.fileno(), select.EPOLLIN)
                except BlockingIOError:
                    continue
                continue
            sock = sockets[descriptor]
            try:
                data = sock.recv(65536)
            except OSError:
                data = b""
            if not data:
                epoll.unregister(descriptor)
                open_sockets.pop(descriptor, None)
                del sockets[descriptor]
                sock.close()
            elif kind == "http":
                sock.send(_RESPONSE)
            elif descriptor not in open_sockets:
                open_sockets[descriptor] = sock
                sock.send(_HANDSHAKE)
            elif kind == "echo":
                sock.send(
                    FRAME_OUT if len(data) == len(FRAME_IN) else FRAME_OUT * (len(data) // len(FRAME_IN))
                )
            else:
                for other in list(open_sockets.values()) * (len(data) // len(FRAME_IN)):
                    other.send(FRAME_OUT)


def serve_quart() -> None:
    """The HTTP packages without the broker."""
    import trio
    from hypercorn.config import Config
    from hypercorn.trio import serve as serve_app
    from quart_trio import QuartTrio

    app = QuartTrio(__name__)

    @app.route("/<path:_>")
    async def page(_: str) -> str:
        await trio.lowlevel.checkpoint_if_cancelled()
        return "hello"

    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    config = Config()
    config.errorlog = None
    config.bind = [f"fd://{listener.fileno()}"]
    print(f"floor on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    trio.run(serve_app, app, config)


if __name__ == "__main__":
    if sys.argv[1] == "quart":
        serve_quart()
    else:
        serve(sys.argv[1])
