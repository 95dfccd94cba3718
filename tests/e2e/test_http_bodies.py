"""Bodies of requests in the running broker: in files, as streams, and clients that break off (S26)."""

import contextlib
import hashlib
import http.client
import itertools
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.broker_process import BrokerProcess, eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.test_requests import Instance

pytestmark = pytest.mark.e2e

MEMORY_BYTES = 100_000
BODY_BYTES = 3_000_000

APP = """
    import hashlib
    from pathlib import Path

    import trio
    from broker import Refuse, Server

    FOLDER = Path(__file__).parent

    async def gone(name):
        while (FOLDER / name).exists():
            await trio.sleep(0.01)

    class Main(Server):
        '''Takes bodies when they are whole.'''

        @staticmethod
        async def on_before_request(request, lobby):
            if request.rest == "/peek":
                request.headers["X-Size"] = str(len(await request.get_data()))
            if request.rest == "/peek-some":
                async for piece in request.body:
                    request.headers["X-Size"] = str(len(piece))
                    break

        async def on_request(self, request):
            if request.rest == "/unread":
                return "no thanks"
            if request.rest == "/form":
                files = await request.files
                data = files["file"].read()
            elif request.rest == "/pieces":
                data, most = b"", 0
                async for piece in request.body:
                    data += piece
                    most = max(most, len(piece))
                assert most <= 65536 or len(data) <= 100_000  # what was in memory is one piece
            else:
                data = await request.get_data()
                assert data == await request.get_data()
            return {
                "bytes": len(data), "hash": hashlib.sha256(data).hexdigest(),
                "peeked": request.headers.get("x-size"),
            }

        @staticmethod
        async def on_fetch(request, lobby):
            return str(len(await request.get_data()))

    class Streams(Server):
        '''Takes bodies as they come.'''

        stream_requests = True
        turn_timeout = 20

        @staticmethod
        async def on_before_request(request, lobby):
            if request.rest == "/peek":
                await request.get_data()
            if request.args.get("refuse"):
                raise Refuse(403, "no")

        async def on_request(self, request):
            match request.rest:
                case "/whole":
                    return str(len(await request.get_data()))
                case "/upper":
                    return self.upper(request.body)
                case "/hold":
                    first = await anext(aiter(request.body))
                    (FOLDER / f"in-{self.room.id}").touch()
                    try:
                        await gone(f"hold-{self.room.id}")
                        size = len(first)
                        async for piece in request.body:
                            size += len(piece)
                    finally:
                        (FOLDER / f"in-{self.room.id}").unlink()
                    return str(size)
                case "/first":
                    return await anext(aiter(request.body))
                case "/unread":
                    return "no thanks"
            async for piece in request.body:
                (FOLDER / f"got-{self.room.id}").touch()
                self.room.broadcast(piece.decode("latin-1"))
                self.room.storage.put("pieces", await self.room.storage.get("pieces", 0) + 1)
            return "end"

        async def upper(self, body):
            async for piece in body:
                yield piece.upper()

        def on_message(self, message, sender):
            sender.send(message)
"""

numbers = itertools.count()


@pytest.fixture(scope="module")
def process(module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, request_bytes_max=BODY_BYTES, request_memory_bytes=MEMORY_BYTES)


@pytest.fixture
def instance(process: BrokerProcess) -> Iterator[Instance]:
    made = Instance(process)
    pids = process.host_pids()
    yield made
    made.end()
    assert process.host_pids() == pids


@pytest.fixture
def room() -> str:
    return f"room-{next(numbers)}"


def spilled(instance: Instance) -> int:
    """Files without a name that the gateway has open in its spill folder."""
    folder = f"/proc/{instance.process.gateway_pid()}/fd"
    links = []
    for name in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):
            links.append(os.readlink(f"{folder}/{name}"))
    return sum("/spill/" in link for link in links)


@pytest.mark.parametrize("size", [MEMORY_BYTES, MEMORY_BYTES + 1, 2 * 65536, BODY_BYTES])
@pytest.mark.parametrize("rest", ["", "/pieces", "/peek", "/peek-some"])
def test_large_bodies_arrive_whole(instance, room, size, rest):
    """S26: those that waited in a file like others, for hooks that look before, too."""
    data = os.urandom(size)
    reply = instance.ask("POST", f"/party/{room}{rest}", data)
    assert reply.status == 200
    assert reply.json["bytes"] == size
    assert reply.json["hash"] == hashlib.sha256(data).hexdigest()
    if rest == "/peek":
        assert reply.json["peeked"] == str(size)
    eventually(lambda: not spilled(instance))


@pytest.mark.parametrize("over", [-1, 0, 1])
@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_in_files_have_their_limit(instance, room, over, chunked):
    """S26: 413, at one below, at, and one above."""
    data = b"x" * (BODY_BYTES + over)
    body = iter([data[:1_000_000], data[1_000_000:]]) if chunked else data
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        reply = instance.ask("POST", f"/party/{room}", body)
        assert reply.status == (413 if over > 0 else 200)
        return
    assert over > 0


def test_large_bodies_of_other_kinds(instance, room):
    """S26: a form's file, a body nobody reads, one of no room."""
    data = b"y" * 1_000_000
    form = (
        b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + data + b"\r\n--X--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=X"}
    assert instance.ask("POST", f"/party/{room}/form", form, headers).json["bytes"] == len(data)
    assert instance.ask("POST", f"/party/{room}/unread", data).text == "no thanks"
    assert instance.ask("POST", "/upload", data).text == "1000000"
    eventually(lambda: not spilled(instance))


class Upload:
    """A request whose body the test sends bit by bit."""

    def __init__(self, instance: Instance, path: str, length: int | None = None, *headers: str) -> None:
        self.sock = socket.create_connection(("127.0.0.1", instance.process.port), 20)
        self.chunked = length is None
        kind = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
        lines = [f"POST {path} HTTP/1.1", "Host: x", kind, *headers, "", ""]
        self.sock.sendall("\r\n".join(lines).encode())

    def send(self, data: bytes) -> None:
        self.sock.sendall(b"%x\r\n%s\r\n" % (len(data), data) if self.chunked else data)

    def answer(self) -> tuple[int, bytes]:
        """End the body and give the answer."""
        if self.chunked:
            self.sock.sendall(b"0\r\n\r\n")
        response = http.client.HTTPResponse(self.sock)
        response.begin()
        return response.status, response.read()

    def close(self) -> None:
        self.sock.close()


def test_a_streamed_body_reaches_its_room_while_it_comes(instance, room):
    """S26: piece by piece, though a turn's effects leave when it ends; and then the turn goes on."""
    client = instance.connect("streams", room)
    upload = Upload(instance, f"/parties/streams/{room}")
    upload.send(b"one")
    eventually(instance.file(f"got-{room}").exists)
    client.send("behind it")
    upload.send(b"two")
    assert client.is_silent(0.2)
    assert upload.answer() == (200, b"end")
    received = client.receive()
    while received != "onetwo":
        received += client.receive()
    assert client.receive() == "behind it"
    upload.close()


def test_an_answer_can_be_made_of_a_body_that_still_comes(instance, room):
    """S26: both ways at once."""
    upload = Upload(instance, f"/parties/streams/{room}/upper")
    upload.send(b"abc")
    received = b""
    while b"ABC" not in received:
        received += upload.sock.recv(1000)
    assert received.startswith(b"HTTP/1.1 200")
    upload.send(b"def")
    while b"DEF" not in received:
        received += upload.sock.recv(1000)
    upload.sock.sendall(b"0\r\n\r\n")
    while not received.endswith(b"0\r\n\r\n"):
        received += upload.sock.recv(1000)
    upload.close()


@pytest.mark.parametrize("size", [0, 1, 65536, 65537, BODY_BYTES])
@pytest.mark.parametrize("chunked", [False, True])
def test_streamed_bodies_arrive_whole(instance, room, size, chunked):
    data = os.urandom(size)
    body = iter([data]) if chunked else data
    assert instance.ask("POST", f"/parties/streams/{room}/whole", body).text == str(size)
    reply = instance.ask("POST", f"/parties/streams/{room}/upper", b"x" * size)
    assert reply.body == b"X" * size


def test_a_room_that_reads_slowly_holds_its_client_back(instance, room):
    """S26: the broker keeps no more of the body than a few pieces."""
    instance.hold(f"hold-{room}")
    upload = Upload(instance, f"/parties/streams/{room}/hold", BODY_BYTES)
    upload.send(b"x")
    eventually(instance.file(f"in-{room}").exists)
    sent = threading.Event()

    def send() -> None:
        upload.send(b"x" * (BODY_BYTES - 1))
        sent.set()

    upload.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
    thread = threading.Thread(target=send)
    thread.start()
    assert not sent.wait(0.3)
    instance.release(f"hold-{room}")
    thread.join(20)
    assert upload.answer() == (200, str(BODY_BYTES).encode())
    upload.close()


def test_a_client_that_breaks_off_cancels_the_turn(instance, room):
    """S26: while its room waits for more, and while it does not."""
    client = instance.connect("streams", room)
    upload = Upload(instance, f"/parties/streams/{room}", 1000)
    upload.send(b"begun")
    eventually(instance.file(f"got-{room}").exists)
    client.send("behind it")
    assert client.is_silent(0.2)
    upload.close()
    assert client.receive() == "behind it"  # and nothing of the turn
    instance.hold(f"hold-{room}")
    upload = Upload(instance, f"/parties/streams/{room}/hold", 1000)
    upload.send(b"begun")
    eventually(instance.file(f"in-{room}").exists)
    upload.close()
    eventually(lambda: not instance.file(f"in-{room}").exists())


def test_a_streamed_body_may_stay_unread(instance, room):
    """S26: refused, or answered from its head."""
    upload = Upload(instance, f"/parties/streams/{room}/first", BODY_BYTES)
    upload.send(b"begun")
    assert upload.answer() == (200, b"begun")
    upload.close()
    for path, status in (("/unread", 200), ("?refuse=1", 403), ("/peek", 500)):
        upload = Upload(instance, f"/parties/streams/{room}{path}", BODY_BYTES)
        assert upload.answer()[0] == status
        upload.close()
    eventually(
        lambda: any("for on_request alone" in str(event) for event in instance.process.log_events()),
        "a line of the log",
    )


@pytest.mark.parametrize("party", ["main", "streams"])
def test_expect_100_continue(instance, room, party):
    """RFC 9110, section 10.1.1: told to go on before the body, or refused before it."""
    rest = "/whole" if party == "streams" else ""
    upload = Upload(instance, f"/parties/{party}/{room}{rest}", 5, "Expect: 100-continue")
    assert upload.sock.recv(1000).startswith(b"HTTP/1.1 100 ")
    upload.send(b"12345")
    assert upload.answer()[0] == 200
    upload.close()
    upload = Upload(instance, f"/parties/{party}/{room}", BODY_BYTES + 1, "Expect: 100-continue")
    assert upload.sock.recv(1000).startswith(b"HTTP/1.1 413 ")
    upload.close()


def test_death_of_the_host_while_a_body_comes(broker):
    """S26: 502, since the turn had begun; a body in a file waits for its turn and is not lost by others'."""
    instance = Instance(broker(APP))
    instance.hold("hold-r")
    upload = Upload(instance, "/parties/streams/r/hold")
    upload.send(b"begun")
    eventually(Path(instance.file("in-r")).exists)
    instance.process.kill_host()
    assert upload.answer()[0] == 502
    upload.close()
    assert instance.ask("POST", "/party/r", b"x" * 2_000_000).json["bytes"] == 2_000_000
    instance.end()
