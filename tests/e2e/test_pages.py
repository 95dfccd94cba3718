"""Pages of the app beside its rooms: a mounted Quart app, files of a folder, cookies, streams (S26)."""

import contextlib
import http.client
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.broker_process import BrokerProcess, eventually

pytestmark = pytest.mark.e2e

APP = """
    import json
    from pathlib import Path

    import trio
    from broker import Response, Server, mount, sse
    from quart import abort, jsonify, redirect, render_template_string, request, send_file, session
    from quart_trio import QuartTrio
    from werkzeug.datastructures import Headers

    FOLDER = Path(__file__).parent
    site = QuartTrio(__name__, static_folder=str(FOLDER / "assets"), static_url_path="/assets")
    site.secret_key = "a secret of the tests"
    events = []

    async def gone(name):
        while (FOLDER / name).exists():
            await trio.sleep(0.01)

    @site.before_serving
    async def begin():
        events.append("begun")

    @site.after_serving
    async def end():
        (FOLDER / "served").write_text(" ".join(events))

    @site.route("/")
    async def front():
        return await render_template_string("<p>{{ text }}</p>", text="<grüße>")

    @site.route("/item/<int:number>", methods=["GET", "POST"])
    async def item(number):
        return {"number": number, "args": request.args.to_dict(), "body": (await request.get_data()).decode(),
                "client": request.remote_addr, "host": request.host}

    @site.route("/login/<name>")
    async def login(name):
        session["name"] = name
        answer = jsonify(name)
        answer.set_cookie("a", "1")
        answer.set_cookie("b", "ü")
        return answer

    @site.route("/me")
    async def me():
        return [session.get("name"), request.cookies.to_dict()]

    @site.route("/raise")
    async def fail():
        raise ValueError("a secret")

    @site.route("/abort")
    async def gives_up():
        abort(410)

    @site.route("/upload", methods=["POST"])
    async def upload():
        size = 0
        async for piece in request.body:
            size += len(piece)
        return str(size)

    @site.route("/endless")
    async def endless():
        async def pieces():
            try:
                (FOLDER / "endless").touch()
                while True:
                    yield b"x" * 1000
                    await trio.sleep(0.005)
            finally:
                (FOLDER / "endless").unlink()
        return pieces()

    @site.route("/hold")
    async def hold():
        (FOLDER / "in-hold").touch()
        try:
            await trio.sleep_forever()
        finally:
            (FOLDER / "in-hold").unlink()

    @site.route("/room/<name>")
    async def room(name):
        other = request.scope["broker.lobby"].parties["chat"].get(name)
        other.broadcast("from a page")
        return await other.fetch("/hello")

    @site.route("/later")
    async def later():
        site.add_background_task(note)
        return "noted"

    async def note():
        (FOLDER / "noted").touch()

    class Main(Server):
        static = "public"
        cors = True
        on_fetch = mount(site)

        async def on_request(self, request):
            match request.rest:
                case "/cookies":
                    answer = Response(json.dumps(request.cookies))
                    answer.set_cookie("a", "1", httponly=True)
                    answer.set_cookie("b", "2", path="/x")
                    return answer
                case "/events":
                    return self.events(), {"Content-Type": "text/event-stream"}
                case "/redirect":
                    return redirect("/elsewhere")
                case "/file":
                    return await send_file(FOLDER / "public" / "page.css")
                case "/json":
                    return jsonify({"a": "ü"})
                case "/headers":
                    return "", 204, Headers([("X-Twice", "1"), ("X-Twice", "2"), ("X-Umlaut", "ü")])
                case "/abort":
                    abort(418)
                case "/echo":
                    return {"umlaut": request.headers.get("x-umlaut"), "q": request.args.get("q")}
                case "/raise":
                    raise ValueError("a secret")
            return {"method": request.method}

        async def events(self):
            try:
                (FOLDER / "events").touch()
                yield sse("one\\ntwo", event="news", id="1", retry=1500)
                yield sse({"a": "ü"})
                await gone("hold-events")
                yield sse("three")
                await trio.sleep_forever()
            finally:
                (FOLDER / "events").unlink()

        def on_message(self, message, sender):
            sender.send(message)

    class Chat(Server):
        async def on_request(self, request):
            return f"{request.rest} {self.room.id} {request.caller}"

        def on_message(self, message, sender):
            sender.send(message)
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    folder = tmp_path_factory.mktemp("pages")
    (folder / "public").mkdir()
    (folder / "assets").mkdir()
    (folder / "public" / "page.css").write_text("a {}")
    (folder / "public" / "about").mkdir()
    (folder / "public" / "about" / "index.html").write_text("<p>about</p>")
    (folder / "public" / "large").write_bytes(bytes(range(250)) * 4000)
    (folder / "public" / ".env").write_text("TOKEN=1")
    (folder / "assets" / "site.js").write_text("1;")
    with BrokerProcess(folder, APP, request_memory_bytes=1000) as made:
        yield made
        made.stop()
    assert (folder / "served").read_text() == "begun"  # the app's own start and end


@pytest.fixture
def client(process: BrokerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=process.url(""), timeout=20, trust_env=False) as made:
        yield made


# --- A mounted app --------------------------------------------------------------------------------


def test_routes_templates_and_bodies_of_a_mounted_app(process, client):
    """S26: it answers what belongs to no room."""
    assert client.get("/").text == "<p>&lt;grüße&gt;</p>"
    seen = client.post("/item/5?a=ü", content="ä" * 3000).json()
    assert (seen["number"], seen["args"], seen["body"]) == (5, {"a": "ü"}, "ä" * 3000)
    assert (seen["client"], seen["host"]) == ("127.0.0.1", f"127.0.0.1:{process.port}")
    assert client.post("/upload", content=b"x" * 1_000_000).text == "1000000"
    assert client.get("/nowhere").status_code == 404
    assert client.put("/item/5").status_code == 405
    assert client.options("/item/5").headers["allow"].count("POST") == 1
    assert client.get("/abort").status_code == 410
    assert client.get("/assets/site.js").text == "1;"
    head = client.head("/item/5")
    assert (head.status_code, head.content) == (200, b"")


def test_sessions_and_cookies_of_a_mounted_app(client):
    answer = client.get("/login/ann")
    assert len(answer.headers.get_list("set-cookie")) == 3
    name, cookies = client.get("/me").json()
    assert (name, cookies["a"], cookies["b"]) == ("ann", "1", "ü")


def test_a_mounted_app_that_fails(process, client):
    """S39: no details; the host goes on."""
    answer = client.get("/raise")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert client.get("/item/1").status_code == 200


def test_a_client_that_leaves_ends_what_a_mounted_app_does(process, client):
    """S26: while it streams, and before it has answered."""
    with client.stream("GET", "/endless") as answer:
        pieces = answer.iter_raw()  # one that is dropped closes the connection
        assert next(pieces)
        eventually((process.folder / "endless").exists)
    eventually(lambda: not (process.folder / "endless").exists())
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=20)
    connection.request("GET", "/hold")
    eventually((process.folder / "in-hold").exists)
    connection.close()
    eventually(lambda: not (process.folder / "in-hold").exists())


def test_a_mounted_app_reaches_rooms(process, client):
    """S30."""
    with contextlib.closing(process.connect("/parties/chat/r")) as listener:
        assert client.get("/room/r").text == "/hello r main/"
        assert listener.receive() == "from a page"


def test_background_tasks_of_a_mounted_app(process, client):
    assert client.get("/later").text == "noted"
    eventually((process.folder / "noted").exists)


# --- Files ----------------------------------------------------------------------------------------


def test_files_of_a_folder(client):
    """S26: before `on_fetch`, which gets the rest."""
    answer = client.get("/page.css")
    assert (answer.text, answer.headers["content-type"]) == ("a {}", "text/css; charset=utf-8")
    again = client.get("/page.css", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/about").headers["location"] == "/about/"
    assert client.get("/about/").text == "<p>about</p>"
    large = bytes(range(250)) * 4000
    assert client.get("/large").content == large
    part = client.get("/large", headers={"Range": "bytes=100-300099"})
    assert (part.status_code, part.content) == (206, large[100:300100])
    assert part.headers["content-range"] == "bytes 100-300099/1000000"
    head = client.head("/large")
    assert (head.headers["content-length"], head.content) == ("1000000", b"")
    assert client.post("/page.css").status_code == 404  # the app's answer


@pytest.mark.parametrize(
    "path", ["/.env", "/..%2fapp.py", "/%2e%2e/app.py", "/about/..%2f..%2fapp.py", "/%00"]
)
def test_what_is_no_file_of_the_folder(process, path):
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("GET", path)
        assert connection.getresponse().status == 404


def test_a_folder_alone_needs_no_hook(broker):
    """S26: the simplest page; other methods are 405, what is not there 404."""
    source = """
        from broker import Server

        class Chat(Server):
            static = "."

            def on_message(self, message, sender):
                sender.send(message)
    """
    started = broker(source)
    with httpx.Client(base_url=started.url(""), timeout=20, trust_env=False) as client:
        assert "class Chat" in client.get("/app.py").text
        assert client.post("/app.py").status_code == 405
        assert client.get("/nothing").status_code == 404


# --- Rooms ----------------------------------------------------------------------------------------


def test_cookies_go_both_ways(client):
    answer = client.get("/party/r/cookies", headers={"Cookie": "k=v; l=w"})
    assert answer.json() == {"k": "v", "l": "w"}
    assert answer.headers.get_list("set-cookie") == ["a=1; HttpOnly; Path=/", "b=2; Path=/x"]


def test_what_quart_s_helpers_return(client):
    """S26: redirects, files, JSON, several headers of one name, abort()."""
    answer = client.get("/party/r/redirect")
    assert (answer.status_code, answer.headers["location"]) == (302, "/elsewhere")
    answer = client.get("/party/r/file")
    assert (answer.text, answer.headers["content-type"]) == ("a {}", "text/css; charset=utf-8")
    assert client.get("/party/r/json").json() == {"a": "ü"}
    answer = client.get("/party/r/headers")
    assert (answer.status_code, answer.content) == (204, b"")
    assert answer.headers.get_list("x-twice") == ["1", "2"]
    assert (b"x-umlaut", b"\xfc") in [(name.lower(), value) for name, value in answer.headers.raw]
    assert client.get("/party/r/abort").status_code == 418
    seen = client.get("/party/r/echo?q=%C3%BC", headers=[(b"X-Umlaut", "ü".encode("latin-1"))]).json()
    assert seen == {"umlaut": "ü", "q": "ü"}


def test_head_and_options_of_a_room(client):
    answer = client.head("/party/r")
    assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "19")
    assert client.options("/party/r").json() == {"method": "OPTIONS"}
    assert client.options("/parties/chat/r").status_code == 200


def test_cors_on_every_answer(client):
    """Preflights of rooms without waking one; headers whatever the status."""
    asked = {"Origin": "https://example.com", "Access-Control-Request-Method": "PUT"}
    answer = client.options("/party/preflight", headers=asked)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (204, "*")
    assert "PUT" in answer.headers["access-control-allow-methods"]
    for path, status in (
        ("/party/r", 200),
        ("/party/r/abort", 418),
        ("/party/r/raise", 500),
        ("/party/r/redirect", 302),
        ("/page.css", 200),
        ("/item/5", 200),
        ("/nowhere", 404),
    ):
        answer = client.get(path, headers={"Origin": "https://example.com"})
        assert (answer.status_code, answer.headers.get("access-control-allow-origin")) == (status, "*"), path
    assert "access-control-allow-origin" not in client.get("/parties/chat/r").headers


def test_server_sent_events(process, client):
    """S26: each as it comes, other turns meanwhile; a client that leaves ends the generator."""
    (process.folder / "hold-events").touch()
    with client.stream("GET", "/party/events/events") as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        received = ""
        pieces = answer.iter_text()
        while received.count("\n\n") < 2:
            received += next(pieces)
        assert received == 'id: 1\nevent: news\nretry: 1500\ndata: one\ndata: two\n\ndata: {"a":"ü"}\n\n'
        with contextlib.closing(process.connect("/party/events")) as other:
            other.send("meanwhile")
            assert other.receive() == "meanwhile"
        (process.folder / "hold-events").unlink()
        assert next(pieces) == "data: three\n\n"
        assert (process.folder / "events").exists()
    eventually(lambda: not (process.folder / "events").exists())
