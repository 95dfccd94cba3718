"""The real command behind nginx, which keeps its connection alive: upgrades come where HTTP was spoken.

That an upgrade took a kept-alive connection is read from the kernel: the broker's port has the same one peer
before and after it.
"""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.tools import nginx

APP = """
from pathlib import Path

import trio

from broker import Server

FOLDER = Path(__file__).parent


class Chat(Server):
    async def on_connect(self, connection, ctx):
        connection.send(f"welcome from {ctx.request.headers.get('x-forwarded-for')}")

    async def on_message(self, message, sender):
        sender.send(message)

    async def on_request(self, request):
        if request.rest == "/stream":
            return stream()
        return {"rest": request.rest, "client": request.remote_addr, "bytes": len(await request.get_data())}


async def stream():
    for number in range(3):
        while not (FOLDER / f"go-{number}").exists():
            await trio.sleep(0.01)
        yield f"{number}\\n"
"""

DEADLINE_SECONDS = 20


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {DEADLINE_SECONDS} s"
        time.sleep(0.02)


@contextlib.contextmanager
def process(*command: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is told to stop at the end of the block, and killed if it does not."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    running = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True, env=environ)
    try:
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(DEADLINE_SECONDS)
        finally:
            running.kill()
            running.wait()
            assert running.stdout is not None
            running.stdout.close()


@dataclass
class Site:
    """nginx with the broker behind it, whose folder is `folder`."""

    folder: Path
    port: int
    broker_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: object) -> httpx.Client:
        """A client whose address is 127.0.0.2, so that it is not the proxy's."""
        transport = httpx.HTTPTransport(local_address="127.0.0.2")
        return httpx.Client(base_url=self.url, transport=transport, **options)  # type: ignore[arg-type]

    def websocket(self, path: str) -> ClientConnection:
        return connect(
            f"ws://127.0.0.1:{self.port}{path}", source_address=("127.0.0.2", 0), compression=None, proxy=None
        )

    def has_left(self, port: int) -> bool:
        return port not in self.upstream_ports()

    def upstream_ports(self) -> set[int]:
        """The ports of nginx's open connections to the broker."""
        ports = set()
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, state = line.split()[:4]
            if state == "01" and int(remote.rpartition(":")[2], 16) == self.broker_port:
                ports.add(int(local.rpartition(":")[2], 16))
        return ports


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    program = nginx()
    folder = tmp_path_factory.mktemp("nginx")
    (folder / "chat.py").write_text(APP)
    serve = [sys.executable, "-P", "-m", "broker", "serve", "chat.py", "--bind", "127.0.0.1:0"]
    serve += ["--data", str(folder / "data"), "--trusted-proxies", "127.0.0.1"]
    with process(*serve, folder=folder) as broker:
        assert broker.stdout is not None
        ready = broker.stdout.readline()
        assert ready.startswith("ready on http://127.0.0.1:")
        site = Site(folder, free_port(), int(ready.rpartition(":")[2]))
        template = (Path(__file__).parent / "nginx.conf").read_text()
        (folder / "nginx.conf").write_text(
            template.format(folder=folder, port=site.port, broker_port=site.broker_port)
        )
        with process(program, "-p", str(folder), "-c", str(folder / "nginx.conf"), folder=folder) as proxy:

            def answers() -> bool:
                assert proxy.poll() is None
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"{site.url}/_broker/health").status_code == 200
                return False

            eventually(answers, "answer of nginx")
            yield site


def test_an_upgrade_takes_the_connection_that_a_request_has_used(site: Site) -> None:
    for turn in range(3):
        with site.client() as client:
            assert client.get("/party/room/sub").json()["rest"] == "/sub"
            assert client.get("/party/room").status_code == 200
        eventually(lambda: len(site.upstream_ports()) == 1, "single connection that is kept")
        [kept] = site.upstream_ports()
        with site.websocket(f"/party/room?turn={turn}") as websocket:
            assert site.upstream_ports() == {kept}
            assert websocket.recv(DEADLINE_SECONDS) == "welcome from 127.0.0.2"
            for message in ("text", b"\xff" * 10, "x" * 300_000):
                websocket.send(message)
                assert websocket.recv(DEADLINE_SECONDS) == message
            with site.client() as client:  # on a second connection, since the first is a WebSocket now
                assert client.get("/party/room").status_code == 200
            assert kept in site.upstream_ports()
        eventually(functools.partial(site.has_left, kept), "end of the WebSocket's connection")


def test_many_websockets_and_requests_in_turns(site: Site) -> None:
    with contextlib.ExitStack() as stack, site.client() as client:
        websockets = []
        for number in range(20):
            assert client.post("/party/many", content=b"x" * number).json()["bytes"] == number
            websockets.append(stack.enter_context(site.websocket("/party/many")))
        for number, websocket in enumerate(websockets):
            websocket.send(str(number))
        for number, websocket in enumerate(websockets):
            assert websocket.recv(DEADLINE_SECONDS) == "welcome from 127.0.0.2"
            assert websocket.recv(DEADLINE_SECONDS) == str(number)


def test_a_refused_upgrade_ends_its_connection_and_nothing_else(site: Site) -> None:
    """Row 47."""
    with site.client() as client:
        assert client.get("/party/room").status_code == 200
        upgrade = {"Upgrade": "websocket", "Sec-WebSocket-Version": "8", "Sec-WebSocket-Key": "A" * 22 + "=="}
        assert client.get("/party/room", headers=upgrade).status_code == 426
        assert client.get("/party/room").status_code == 200


def test_the_proxy_says_who_its_client_is_and_the_client_cannot(site: Site) -> None:
    """S37; row 52."""
    with site.client(headers={"X-Forwarded-For": "6.6.6.6"}) as client:
        assert client.get("/party/room").json()["client"] == "127.0.0.2"
    forged = {"X-Forwarded-For": "6.6.6.6"}
    direct = httpx.get(f"http://127.0.0.1:{site.broker_port}/party/room", headers=forged)
    assert direct.json()["client"] == "6.6.6.6"  # 127.0.0.1 is the listed proxy, and may say so


def test_streams_and_large_bodies_pass(site: Site) -> None:
    """S26."""
    with site.client() as client:
        assert client.post("/party/room", content=b"x" * 1_000_000).json()["bytes"] == 1_000_000
        assert client.post("/party/room", content=b"x" * 5_000_000).json()["bytes"] == 5_000_000
        assert client.post("/party/room", content=b"x" * 17_000_000).status_code == 413
        with client.stream("GET", "/party/room/stream") as response:
            # Each piece is made when the one before has been read here.
            (site.folder / "go-0").touch()
            for number, line in enumerate(response.iter_lines()):
                assert line == str(number)
                (site.folder / f"go-{number + 1}").touch()
            assert number == 2
        assert client.get("/_broker/api/rooms").status_code == 401
