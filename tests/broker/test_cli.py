"""The command line: what it prints, what it refuses, and with which status."""

import contextlib
import json
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest
from click.testing import CliRunner, Result
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from broker.cli import cli
from broker.cli.ask import plain
from broker.cli.watching import counts
from hibernation.admin import AdminClient, AdminError, NotRunning, stop, supervisor_of
from hibernation.processes import ProcessList, started_at_ticks
from hibernation.settings import SETTINGS
from storage.directory import DataDirectory

ROOT = Path(__file__).resolve().parents[2]

CHAT = """
from broker import Server

class Chat(Server):
    async def on_message(self, message, sender):
        self.room.broadcast(message)
"""


def invoke(*arguments: str) -> Result:
    """Run a command in this process; only for those that start nothing."""
    return CliRunner().invoke(cli, list(arguments))


class Broker:
    """Starts `python -m broker` in a folder of its own, and ends all that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "broker", *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._started.append(process)
        return process

    def run(self, *arguments: str, environ: dict[str, str] | None = None) -> tuple[int, str, str]:
        """Give status, standard output and standard error of a command that ends by itself."""
        process = self.start(*arguments, environ=environ)
        out, err = process.communicate(timeout=40)
        return process.returncode, out, err

    def ask(self, *arguments: str) -> str:
        """Give what a command says that only speaks to the instance; it runs in this process."""
        result = invoke(*arguments, "--data", str(self.folder / ".broker"))
        assert result.exit_code == 0, result.output
        return result.output

    def stats(self) -> Any:
        """Give what `broker stats --json` says."""
        return json.loads(self.ask("stats", "--json"))

    def close(self) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        # They outlive their supervisor (S34), and hold the other ends of its pipes.
        for listed in self.folder.rglob("processes.json"):
            for _, pid in ProcessList(listed.parent).surviving():
                with contextlib.suppress(ProcessLookupError):  # it may be about to end by itself
                    os.kill(pid, signal.SIGKILL)
        for process in self._started:
            process.communicate()


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    made = Broker(tmp_path)
    yield made
    made.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What is refused: exit status 2 for what was typed and for the app, 1 for the machine; never a traceback


APP_MISTAKES = {
    "a missing file": ("nowhere.py", None, "there is no file"),
    "no Server in it": ("empty.py", "x = 1\n", "there is no Server in empty.py"),
    "two parties with one name": (
        "twice.py",
        "from broker import Server\nclass HTTPServer(Server): pass\nclass HttpServer(Server): pass\n",
        "http-server",
    ),
    "an app called storage": ("storage.py", CHAT, "rename the app"),
    "a misspelt hook": (
        "hook.py",
        "from broker import Server\nclass Chat(Server):\n    def on_mesage(self): pass\n",
        "on_message",
    ),
    "code that does not parse": ("broken.py", "def\n", "broken.py is not valid Python"),
    "code that raises": ("raises.py", "1 / 0\n", "ZeroDivisionError"),
    "code that ends the process": ("ends.py", "import os\nos._exit(7)\n", "exit status 7"),
}


@pytest.mark.parametrize(
    ("command", "mistake"), [*(("serve", mistake) for mistake in APP_MISTAKES), ("dev", "no Server in it")]
)
def test_an_app_that_cannot_be_served_is_named_and_nothing_stays_running(broker, command, mistake):
    name, text, expected = APP_MISTAKES[mistake]
    if text is not None:
        (broker.folder / name).write_text(text)
    where = ["--bind", "127.0.0.1:0"] if command == "serve" else ["--port", "0"]
    status, out, err = broker.run(command, name, *where)
    assert expected in err and "Error: " in err
    assert status == (1 if mistake == "code that ends the process" else 2)
    assert "ready" not in out and "supervisor.py" not in err
    assert ProcessList(broker.folder / ".broker").surviving() == []


def test_a_port_in_use_is_named_with_a_way_out(broker):
    (broker.folder / "chat.py").write_text(CHAT)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        status, out, err = broker.run("serve", "chat.py", "--bind", f"127.0.0.1:{port}")
        assert status == 1 and out == ""
        assert f"port {port} of 127.0.0.1 is in use" in err and "--bind 127.0.0.1:" in err
        status, _, err = broker.run("dev", "chat.py", "--port", str(port))
        assert status == 1 and re.search(r"choose another with --port \d+", err)


def test_a_data_directory_in_use_names_its_holder(broker):
    """FAULTS 42: a second start says who holds it."""
    (broker.folder / "chat.py").write_text(CHAT)
    with DataDirectory(broker.folder / ".broker"):
        status, out, err = broker.run("serve", "chat.py", "--bind", "127.0.0.1:0")
    assert status == 1 and out == ""
    assert str(os.getpid()) in err and "Traceback" not in err


def test_a_data_directory_of_a_newer_schema_is_refused(broker):
    (broker.folder / "chat.py").write_text(CHAT)
    with DataDirectory(broker.folder / ".broker"):
        pass
    meta = broker.folder / ".broker" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "format": 999}))
    status, _, err = broker.run("serve", "chat.py", "--bind", "127.0.0.1:0")
    assert status == 1 and "999" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["serve", "chat.py", "--hots", "2"], "'--hosts'"),
        (["serve", "chat.py", "--idle-second", "2"], "'--idle-seconds'"),
        (["serve", "chat.py", "--idle-seconds", "-1"], "--idle-seconds: give a number of seconds from 0"),
        (["serve", "chat.py", "--gateways", "2"], "not available"),
        (["serve", "chat.py", "--hosts", "0"], "--hosts"),
        (["serve", "chat.py", "--bind", "localhost"], "give HOST:PORT"),
        (["serve", "chat.py", "--bind", "::1:1999"], "[::1]:1999"),
        (["serve", "chat.py", "--bind", "127.0.0.1:65536"], "give HOST:PORT"),
        (["serve", "chat.py", "--var", "SECRET"], "give NAME=VALUE"),
        (["serve", "chat.py", "--var", "=canary"], "give NAME=VALUE"),
        (["dev", "chat.py", "--port", "65536"], "--port"),
        (["serve"], "Missing argument 'APP'"),
        (["rooms", "--room", "x"], "No such option"),
    ],
)
def test_a_mistake_in_what_was_typed_has_status_2(arguments, expected):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert expected in result.output and "canary" not in result.output


def test_an_unknown_variable_is_an_error_that_names_the_nearest(monkeypatch):
    monkeypatch.setenv("BROKER_IDLE_SECOND", "1")
    result = invoke("serve", "chat.py")
    assert result.exit_code == 2
    assert "BROKER_IDLE_SECONDS" in result.output


def test_each_host_needs_a_shard(broker):
    (broker.folder / "chat.py").write_text(CHAT)
    status, _, err = broker.run("serve", "chat.py", "--hosts", "5", "--bind", "127.0.0.1:0")
    assert status == 2 and "has 4" in err


@pytest.mark.parametrize("command", ["demo", "dev", "serve"])
def test_every_setting_is_an_option_of_each_command_that_starts(command):
    help_text = invoke(command, "--help").output
    for setting in SETTINGS:
        assert f"  {setting.option} " in help_text


def test_the_commands_are_listed_and_the_version_is_printed():
    result = invoke("--help")
    names = ["demo", "dev", "serve", "rooms", "connections", "stats", "broadcast", "send", "kick"]
    names += ["reload", "upgrade", "drain", "stop", "explain", "dead-letters"]
    assert re.findall(r"^  ([a-z][a-z-]*)  ", result.output, re.MULTILINE) == names
    assert re.fullmatch(r"broker, version \S+.*\n", invoke("--version").output)


@pytest.mark.parametrize("command", ["rooms", "connections", "stats", "reload", "upgrade", "drain", "stop"])
def test_a_command_to_an_instance_that_does_not_run_has_status_1(tmp_path, command):
    result = invoke(command, "--data", str(tmp_path))
    assert result.exit_code == 1
    assert f"no broker runs on {tmp_path}" in result.output


# Asking a gateway, here a stand-in


class Gateway:
    """Answers at `gateway.sock` as told, and remembers what it was asked."""

    def __init__(self, folder: Path, answer: Callable[[dict[str, Any]], object]) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        descriptor = os.open(folder, os.O_PATH)
        self._listener.bind(f"/proc/self/fd/{descriptor}/gateway.sock")
        os.close(descriptor)
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __enter__(self) -> "Gateway":
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as stream:
                assert self._read(stream) == {"role": "admin"}
                while (question := self._read(stream)) is not None:
                    self.asked.append(question)
                    answer = self._answer(question)
                    if answer is None:
                        break
                    body = answer if isinstance(answer, bytes) else cbor2.dumps(answer)
                    stream.write(struct.pack(">I", len(body)) + body)
                    stream.flush()

    @staticmethod
    def _read(stream: Any) -> Any:
        head = stream.read(4)
        return cbor2.loads(stream.read(struct.unpack(">I", head)[0])) if head else None


PAGES: dict[object, object] = {
    None: {"rooms": [{"party": "main", "room": "a", "connections": 2, "awake": False}], "after": "a"},
    "a": {"rooms": [{"party": "main", "room": "b\x1b[2J", "connections": 0, "awake": True}], "after": None},
}


def test_rooms_come_in_pages_and_their_names_write_nothing_to_the_terminal(tmp_path):
    with Gateway(tmp_path, lambda question: {"result": PAGES[question.get("after")]}) as gateway:
        result = invoke("rooms", "--data", str(tmp_path))
        whole = invoke("rooms", "--data", str(tmp_path), "--json")
        one = invoke("rooms", "--data", str(tmp_path), "--json", "--limit", "1")
    assert result.exit_code == 0 and "\x1b" not in result.output and "b\\x1b[2J" in result.output
    assert [room["room"] for room in json.loads(whole.output)] == ["a", "b\x1b[2J"]
    assert [room["room"] for room in json.loads(one.output)] == ["a"]
    assert gateway.asked[:2] == [{"command": "rooms"}, {"command": "rooms", "after": "a"}]


def test_connections_are_asked_for_by_party_room_tag_and_id(tmp_path):
    with Gateway(tmp_path, lambda _: {"result": {"connections": [], "after": None}}) as gateway:
        result = invoke(
            *("connections", "--data", str(tmp_path)),
            *("--party", "p", "--room", "r", "--tag", "t", "--id", "i"),
        )
    assert result.output == "no such connection\n"
    assert gateway.asked == [{"command": "connections", "party": "p", "room": "r", "tag": "t", "id": "i"}]


def test_stats_names_the_supervisor_as_the_data_directory_does(tmp_path):
    here = os.getpid()
    ProcessList(tmp_path).write([("supervisor", here), ("gateway", 1), ("keeper", here), ("spare", here)])
    answer = {"supervisor": 1, "gateways": [7], "hosts": [8], "connections": 12345, "refused": {"503": 1}}
    with Gateway(tmp_path, lambda _: {"result": answer}):
        result = invoke("stats", "--data", str(tmp_path), "--json")
        table = invoke("stats", "--data", str(tmp_path))
    given = json.loads(result.output)
    assert {name: given[name] for name in ("supervisor", "gateways", "keepers", "hosts", "spares")} == {
        "supervisor": here,
        "gateways": [7],
        "keepers": [here],
        "hosts": [8],
        "spares": [here],
    }
    assert "12,345" in table.output and "refused 503" in table.output


def test_broadcast_send_and_kick_are_passed_on(tmp_path):
    data = ("--data", str(tmp_path))
    with Gateway(tmp_path, lambda _: {"result": {"sent": 3}}) as gateway:
        assert invoke("broadcast", "lobby", "hi", "--tag", "de", *data).output == "sent to 3 connections\n"
        assert invoke("send", "lobby", "ann", "hi", "--party", "chat", *data).exit_code == 0
        assert invoke("kick", "lobby", "ann", "--code", "4000", "--reason", "bye", *data).output == "closed\n"
    assert gateway.asked == [
        {"command": "broadcast", "party": "main", "room": "lobby", "message": "hi", "tag": "de"},
        {"command": "send", "party": "chat", "room": "lobby", "id": "ann", "message": "hi"},
        {"command": "kick", "party": "main", "room": "lobby", "id": "ann", "code": 4000, "reason": "bye"},
    ]


def test_what_the_gateway_refuses_is_said_with_status_1(tmp_path):
    with Gateway(tmp_path, lambda _: {"error": "there is no party p"}):
        result = invoke("rooms", "--party", "p", "--data", str(tmp_path))
    assert result.exit_code == 1 and result.output == "Error: there is no party p\n"


@pytest.mark.parametrize("answer", [None, b"\xff", b"\x01", cbor2.dumps([1])])
def test_an_answer_that_is_none_is_said_with_status_1(tmp_path, answer):
    with Gateway(tmp_path, lambda _: answer):
        result = invoke("stats", "--data", str(tmp_path))
    assert result.exit_code == 1 and "Error: the gateway" in result.output


def test_a_gateway_that_does_not_answer_is_given_up(tmp_path):
    release = threading.Event()
    with Gateway(tmp_path, lambda _: release.wait(20) and None):
        with (
            AdminClient(tmp_path, timeout_seconds=0.1) as client,
            pytest.raises(AdminError, match="does not"),
        ):
            client.ask("stats")
        release.set()


def test_a_socket_whose_path_is_too_long_for_the_kernel_is_reached_all_the_same(tmp_path):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with Gateway(deep, lambda _: {"result": 1}), AdminClient(deep) as client:
        assert client.ask("stats") == 1


def test_stop_without_an_instance_leaves_a_stale_list_alone(tmp_path):
    (tmp_path / "processes.json").write_text(json.dumps([["supervisor", os.getpid(), 1]]))
    with pytest.raises(NotRunning):
        stop(tmp_path)
    assert supervisor_of(tmp_path) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (1999, "1999"),
        ([15000], "15000"),
        (0.12345, "0.123"),
        (["a", "\x07"], "a, \\x07"),
        ([], "-"),
        ({"a": 1}, "a=1"),
        (b"abc", "3 bytes"),
        ("\u202eevil", "\\u202eevil"),
        ("Zürich 東京", "Zürich 東京"),
    ],
)
def test_values_are_shown_without_control_characters(value, text):
    assert plain(value) == text


def test_code_of_an_app_that_is_itself_installed_counts():
    """As the demo's is."""
    folder = Path("/home/me/.venv/lib/python3.11/site-packages/broker/demo")
    assert counts(folder / "chat.py", folder, Path("/tmp/data"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/app/chat.py", True),
        ("/app/deep/er/models.py", True),
        ("/app/.env", True),
        ("/app/.broker/shards/0.db", False),
        ("/app/.broker/strange.py", False),
        ("/app/notes.txt", False),
        ("/app/.#chat.py", False),
        ("/app/.venv/lib/python3.11/site-packages/a.py", False),
        ("/app/__pycache__/a.py", False),
        ("/elsewhere/chat.py", False),
    ],
)
def test_only_code_counts_as_a_save(path, expected):
    assert counts(Path(path), Path("/app"), Path("/app/.broker")) is expected


# The real thing


def ready(process: subprocess.Popen[str], before: list[str] | None = None) -> str:
    """Give the address of the ready line, once it is there; `before` collects the lines above it."""
    assert process.stdout is not None
    assert process.stderr is not None
    for line in process.stdout:
        if found := re.fullmatch(r"ready on (http://127\.0\.0\.1:\d+)\n", line):
            return found[1]
        if before is not None:
            before.append(line)
    raise AssertionError(process.stderr.read())


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


VERSIONED = """
from broker import Server

class Chat(Server):
    async def on_message(self, message, sender):
        sender.send("VERSION " + message)
"""


def open_room(url: str, room: str, who: str = "ann") -> ClientConnection:
    return connect(
        f"{url.replace('http', 'ws')}/party/{room}?_pk={who}", proxy=None, open_timeout=30, close_timeout=5
    )


@pytest.fixture
def served(broker: Broker) -> str:
    """An instance of the chat; gives its address."""
    (broker.folder / "chat.py").write_text(CHAT)
    url = ready(broker.start("serve", "chat.py", "--bind", "127.0.0.1:0"))
    until(lambda: broker.stats()["hosts"])  # which connect by themselves once the gateway is there
    return url


@pytest.mark.e2e
def test_serve_answers_and_stops_with_status_0(broker):
    (broker.folder / "chat.py").write_text(CHAT)
    process = broker.start("serve", "chat.py", "--bind", "127.0.0.1:0")
    url = ready(process)
    with urllib.request.urlopen(f"{url}/_broker/health", timeout=30) as answer:
        assert answer.status == 200
    with open_room(url, "lobby") as client:
        client.send("hi")
        assert client.recv(timeout=30) == "hi"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=30)
        assert client.close_code == 1012
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert not (broker.folder / ".broker" / "processes.json").exists()
    assert not (broker.folder / ".broker" / "gateway.sock").exists()


@pytest.mark.e2e
def test_the_questions_are_answered_and_wake_nothing(broker, served):
    """S42."""
    with open_room(served, "lobby") as ann, open_room(served, "lobby", "ben") as ben:
        ann.send("hi")
        assert ann.recv(timeout=30) == ben.recv(timeout=30) == "hi"
        before = broker.stats()
        rooms = json.loads(broker.ask("rooms", "--json"))
        assert [(room["party"], room["room"], room["connections"]) for room in rooms] == [
            ("chat", "lobby", 2)
        ]
        listed = json.loads(broker.ask("connections", "--room", "lobby", "--json"))
        assert [connection["id"] for connection in listed] == ["ann", "ben"]
        one = json.loads(broker.ask("connections", "--party", "chat", "--id", "ben", "--json"))
        assert [connection["id"] for connection in one] == ["ben"]
        for command in ("rooms", "connections", "stats"):
            assert broker.ask(command).count("\n") > 1
        after = broker.stats()
        assert after["wakes"] == before["wakes"] > 0
    assert len(after["gateways"]) == len(after["hosts"]) == 1 and after["supervisor"]


@pytest.mark.e2e
def test_broadcast_send_and_kick_reach_the_sockets(broker, served):
    with open_room(served, "lobby") as ann, open_room(served, "lobby", "ben") as ben:
        broker.ask("broadcast", "lobby", "to all")
        assert ann.recv(timeout=30) == ben.recv(timeout=30) == "to all"
        broker.ask("send", "lobby", "ben", "to you")
        assert ben.recv(timeout=30) == "to you"
        broker.ask("kick", "lobby", "ann", "--code", "4001", "--reason", "out")
        with pytest.raises(ConnectionClosed):
            ann.recv(timeout=30)
        assert (ann.close_code, ann.close_reason) == (4001, "out")


@pytest.mark.e2e
def test_stop_drains_and_returns_when_all_have_exited(broker, served):
    pids = broker.stats()
    assert str(pids["supervisor"]) in broker.ask("stop")
    for pid in (*pids["gateways"], *pids["keepers"], *pids["hosts"]):
        assert started_at_ticks(pid) is None
    assert invoke("stop", "--data", str(broker.folder / ".broker")).exit_code == 1


@pytest.mark.e2e
def test_stop_ends_what_a_dead_supervisor_has_left_behind(broker, served):
    """S34: they serve on, until somebody says otherwise."""
    pids = broker.stats()
    os.kill(pids["supervisor"], signal.SIGKILL)
    until(lambda: supervisor_of(broker.folder / ".broker") is None)
    with open_room(served, "lobby") as client:
        client.send("still there")
        assert client.recv(timeout=30) == "still there"
        refused = invoke("reload", "--data", str(broker.folder / ".broker"))
        assert refused.exit_code == 1
        assert "broker serve on the same directory takes that over" in refused.output
        # An address can only be changed by a stop and a start.
        status, _, err = broker.run("serve", "chat.py", "--bind", f"127.0.0.1:{free_port()}")
        assert status == 1 and "the instance that is to be taken over listens at" in err
        broker.ask("stop")
    for pid in (*pids["gateways"], *pids["keepers"], *pids["hosts"]):
        assert started_at_ticks(pid) is None


@pytest.mark.e2e
def test_a_second_start_says_who_holds_the_data_directory(broker, served):
    """FAULTS 42."""
    supervisor = broker.stats()["supervisor"]
    status, out, err = broker.run("serve", "chat.py", "--bind", "127.0.0.1:0")
    assert status == 1 and out == "" and str(supervisor) in err


@pytest.mark.e2e
def test_the_files_of_an_instance_are_its_owners_alone(broker, served):
    """FAULTS 43."""
    seen = set()
    for path in [broker.folder / ".broker", *(broker.folder / ".broker").rglob("*")]:
        with contextlib.suppress(FileNotFoundError):  # a list that is written anew gets its name at the end
            mode = path.lstat().st_mode
            assert mode & 0o777 == (0o700 if stat.S_ISDIR(mode) else 0o600), path
            seen.add(path.name)
    assert {"meta.json", "token", "gateway.sock", "shards"} <= seen


@pytest.mark.e2e
def test_a_host_holds_no_socket_of_the_gateway_and_no_file_that_is_not_its_own(broker, served):
    """FAULTS 44."""
    (host,) = broker.stats()["hosts"]
    (gateway,) = broker.stats()["gateways"]

    def sockets(pid: int) -> set[str]:
        links = set()
        for path in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed since it was listed
                links.add(os.readlink(path))
        return {link for link in links if link.startswith("socket:")}

    with open_room(served, "lobby"):
        assert not sockets(host) & sockets(gateway)


@pytest.mark.e2e
def test_a_canary_is_in_no_output_and_on_no_command_line_of_a_child(broker):
    """FAULTS 69."""
    (broker.folder / "chat.py").write_text(CHAT)
    (broker.folder / ".env").write_text("SECRET=hush-hush-17\n")
    process = broker.start("serve", "chat.py", "--bind", "127.0.0.1:0")
    url = ready(process)
    token = (broker.folder / ".broker" / "token").read_text().strip()
    with open_room(url, "lobby") as client:
        client.send("hi")
        client.recv(timeout=30)
    processes = broker.stats()
    for pid in (*processes["gateways"], *processes["hosts"]):
        for name in ("cmdline", "environ"):
            content = Path(f"/proc/{pid}/{name}").read_text()
            assert "hush-hush" not in content and token not in content
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "hush-hush" not in out + err and token not in out + err


@pytest.mark.e2e
def test_dev_puts_saved_code_in_place_and_drops_no_socket(broker):
    """S32: a bad save keeps the old code, going back works."""
    app = broker.folder / "chat.py"
    app.write_text(VERSIONED.replace("VERSION", "1"))
    process = broker.start("dev", "chat.py", "--port", "0")
    url = ready(process)
    log: list[str] = []
    reader = threading.Thread(target=lambda: log.extend(process.stderr))
    reader.start()
    with open_room(url, "lobby") as client:

        def says(expected: str) -> bool:
            client.send("?")
            return client.recv(timeout=30) == f"{expected} ?"

        assert says("1")
        app.write_text(VERSIONED.replace("VERSION", "2"))
        until(lambda: says("2"))
        app.write_text("def\n")
        until(lambda: any("not valid Python" in line for line in log))
        assert says("2")
        app.write_text(VERSIONED.replace("VERSION", "3"))
        until(lambda: says("3"))
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    reader.join()


@pytest.mark.e2e
def test_a_killed_host_is_started_again_and_its_sockets_stay(broker, served):
    with open_room(served, "lobby") as client:
        for number in range(3):
            pids = broker.stats()
            os.kill(pids["hosts"][0], signal.SIGKILL)
            client.send(str(number))
            assert client.recv(timeout=30) == str(number)


@pytest.mark.e2e
def test_the_demo_names_its_address_and_takes_its_data_away(broker):
    process = broker.start("demo", "--port", "0", environ={"TMPDIR": str(broker.folder)})
    text: list[str] = []
    url = ready(process, text)
    with urllib.request.urlopen(f"{url}/", timeout=30) as answer:
        assert answer.status == 200 and b"<html" in answer.read().lower()
    (folder,) = broker.folder.glob("broker-demo-*")
    assert f"{url}/" in "".join(text) and f"broker rooms --data {folder}\n" in "".join(text)
    assert invoke("rooms", "--data", str(folder)).exit_code == 0
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    assert not folder.exists()


@pytest.mark.e2e
def test_a_folder_with_a_storage_of_its_own_is_no_obstacle(broker):
    (broker.folder / "chat.py").write_text(CHAT)
    (broker.folder / "storage").mkdir()
    (broker.folder / "storage" / "__init__.py").write_text("raise SystemExit('the wrong storage')")
    url = ready(broker.start("serve", "chat.py", "--bind", "127.0.0.1:0"))
    with open_room(url, "lobby") as client:
        client.send("hi")
        assert client.recv(timeout=30) == "hi"
