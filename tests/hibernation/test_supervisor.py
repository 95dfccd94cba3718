"""The supervisor, with tiny scripts in the place of gateway and host: restart, back-off, signals, reload."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from hibernation.children import Backoff, Commands, Timing
from hibernation.configuration import GatewayConfig, HostConfig, encode_report
from hibernation.listener import AddressInUse, StartError, bind_listener
from hibernation.processes import ProcessList, started_at_ticks
from hibernation.settings import Settings
from hibernation.supervisor import Plan, Supervisor
from storage.directory import socket_path
from storage.errors import DataDirectoryError

CHILD = """
import json, os, signal, sys
from pathlib import Path
kind, folder = sys.argv[1], Path(sys.argv[2])

def note(what):
    with open(folder / "journal", "a") as file:
        file.write(f"{kind} {what} {os.getpid()}\\n")

# As the real ones do: what it is to do is read when it starts, as code is.
behaviour = (folder / f"{kind}.does").read_text().split()
config = json.loads(sys.stdin.readline())
status = os.fdopen(config["status_fd"], "w", buffering=1)
(folder / f"{kind}.config").write_text(json.dumps(config))
(folder / f"{kind}.facts").write_text(json.dumps({
    "fds": [int(n) for n in os.listdir("/proc/self/fd") if os.path.lexists("/proc/self/fd/" + n)],
    "umask": os.umask(0o077), "cwd": os.getcwd(),
    "session": os.getsid(0) == os.getpid(), "path": sys.path[:1],
}))

def stop(*_):
    note("term")
    if "stubborn" not in behaviour:
        os._exit(0)

signal.signal(signal.SIGTERM, stop)
note("start")
if "die" in behaviour:
    sys.exit(3)
if "hang" in behaviour:
    signal.pause()
if "error" in behaviour:
    print(json.dumps({"event": "error", "text": "no Server in it"}), file=status)
    sys.exit(1)
if kind == "gateway":
    print(json.dumps({"event": "ready"}), file=status)
else:
    print(json.dumps({"event": "loaded", "parties": []}), file=status)
    if sys.stdin.readline() != "go\\n":
        sys.exit(0)
    note("go")
if "die-later" in behaviour:
    sys.exit(4)
while True:
    signal.pause()
"""

QUICK = Timing(
    load_seconds=10,
    drain_seconds=10,
    finish_seconds=10,
    backoff_first_seconds=0.01,
    backoff_limit_seconds=0.02,
    backoff_reset_seconds=60,
)


class Stage:
    """A folder in which the stand-ins find what they are to do, and write down what happened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.does("gateway")
        self.does("host")
        (folder / "child.py").write_text(CHILD)
        self.listener = bind_listener("127.0.0.1", 0, receive_buffer_bytes=131072)
        self.announced: list[tuple[str, int]] = []

    def does(self, kind: str, *behaviour: str) -> None:
        (self.folder / f"{kind}.does").write_text(" ".join(behaviour))

    @property
    def commands(self) -> Commands:
        child = str(self.folder / "child.py")
        return Commands(
            gateway=(sys.executable, "-IS", child, "gateway", str(self.folder)),
            host=(sys.executable, "-IS", child, "host", str(self.folder)),
        )

    def supervisor(
        self,
        *,
        hosts: int = 1,
        timing: Timing = QUICK,
        changes: Callable[[], AsyncIterator[Collection[object]]] | None = None,
    ) -> Supervisor:
        plan = Plan(
            app="chat.py",
            data=self.folder,
            listener=self.listener,
            settings=Settings(),
            hosts=hosts,
            variables={"KEY": "canary"},
        )
        return Supervisor(
            plan, announce=self.announced.append, commands=self.commands, timing=timing, changes=changes
        )

    @property
    def journal(self) -> list[str]:
        """Lines such as "host start", in the order in which they were written."""
        return [line.rsplit(" ", 1)[0] for line in self._lines()]

    def pids(self, what: str) -> list[int]:
        """The processes that wrote `what`."""
        return [int(line.rsplit(" ", 1)[1]) for line in self._lines() if line.startswith(what + " ")]

    def _lines(self) -> list[str]:
        path = self.folder / "journal"
        return path.read_text().splitlines() if path.exists() else []

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


@pytest.fixture
def stage(tmp_path):
    made = Stage(tmp_path)
    yield made
    made.listener.close()
    for line in made._lines():
        pid = int(line.rsplit(" ", 1)[1])
        assert started_at_ticks(pid) is None, f"left running: {line}"


async def until(condition: Callable[[], object], seconds: float = 20) -> None:
    with trio.fail_after(seconds):
        while True:
            await trio.sleep(0.005)  # what is waited for happens in other processes
            if condition():
                return


def more_than(stage: Stage, known: int) -> bool:
    return len(stage.pids("host go")) > known


def running(supervisor: Supervisor, script: Callable[[], Awaitable[None]]) -> None:
    """Run the supervisor with the script beside it, then stop it."""

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                await nursery.start(supervisor.run)
                try:
                    await script()
                finally:
                    supervisor.request_stop()

    trio.run(main)


def test_ready_is_announced_once_the_gateway_answers_and_the_app_is_loaded(stage):
    async def script():
        await until(lambda: stage.announced)
        assert stage.pids("host go") and stage.pids("gateway start")

    running(stage.supervisor(), script)
    assert stage.announced == [stage.listener.getsockname()]


def test_the_gateway_is_stopped_before_the_hosts(stage):
    async def script():
        await until(lambda: "host go" in stage.journal and stage.announced)

    running(stage.supervisor(), script)
    assert [line for line in stage.journal if "term" in line] == ["gateway term", "host term"]


def test_children_get_their_configuration_by_standard_input_and_no_other_descriptor(stage):
    """FAULTS 44, 69: nothing leaks into the children, and nothing stands on their command line."""
    leak = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(leak, True)  # as a library in C may leave it

    async def script():
        await until(lambda: stage.announced)
        for pid in stage.pids("host start"):
            line = Path(f"/proc/{pid}/cmdline").read_bytes()
            assert b"canary" not in line

    running(stage.supervisor(), script)
    os.close(leak)
    config = HostConfig.from_json(json.dumps(stage.read("host.config")))
    assert config.variables == {"KEY": "canary"} and config.shards == (0, 1, 2, 3) and config.index == 0
    gateway = GatewayConfig.from_json(json.dumps(stage.read("gateway.config")))
    assert gateway.address == stage.listener.getsockname() and gateway.hosts == 1
    host_facts, gateway_facts = stage.read("host.facts"), stage.read("gateway.facts")
    assert set(host_facts["fds"]) == {0, 1, 2, config.status_fd}
    assert set(gateway_facts["fds"]) == {0, 1, 2, gateway.status_fd, gateway.listener_fd}
    for facts in (host_facts, gateway_facts):
        assert facts["session"] and facts["umask"] == 0o077 and facts["cwd"] == os.getcwd()


def test_hosts_share_the_shards_out(stage):
    async def script():
        await until(lambda: len(stage.pids("host go")) == 2)

    running(stage.supervisor(hosts=2), script)
    assert stage.read("host.config")["shards"] in ([0, 2], [1, 3])


def test_a_host_that_dies_is_started_again_and_the_gateway_is_left_alone(stage):
    async def script():
        await until(lambda: stage.announced)
        for _ in range(3):
            before = stage.pids("host go")
            os.kill(before[-1], signal.SIGKILL)
            await until(partial(more_than, stage, len(before)))

    running(stage.supervisor(), script)
    assert stage.journal.count("gateway start") == 1


def test_a_gateway_that_dies_is_started_again_with_the_same_listener(stage):
    async def script():
        await until(lambda: stage.announced)
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(str(socket_path(stage.folder)))
        stale.close()
        before = os.fstat(stage.listener.fileno()).st_ino
        os.kill(stage.pids("gateway start")[0], signal.SIGKILL)
        await until(lambda: len(stage.pids("gateway start")) == 2)
        pid = stage.pids("gateway start")[1]
        fd = stage.read("gateway.config")["listener_fd"]
        assert os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{before}]"
        assert not socket_path(stage.folder).exists()  # FAULTS 42: a stale socket is in nobody's way

    running(stage.supervisor(), script)
    assert stage.journal.count("host start") == 1
    assert len(stage.announced) == 1


def test_connections_wait_in_the_listener_while_no_gateway_runs(stage):
    """S34: clients see silence, not a refusal."""

    async def script():
        await until(lambda: stage.announced)
        os.kill(stage.pids("gateway start")[0], signal.SIGKILL)
        with socket.create_connection(stage.listener.getsockname(), timeout=5):
            await until(lambda: len(stage.pids("gateway start")) == 2)

    running(stage.supervisor(), script)


def test_back_off_doubles_to_its_limit_and_begins_again_after_a_long_life():
    backoff = Backoff(Timing())
    assert [backoff.delay(0.0) for _ in range(9)] == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    )
    assert backoff.delay(9.999) == 10.0
    assert backoff.delay(10.0) == 0.1
    assert backoff.delay(0.0) == 0.2


def test_a_host_that_always_dies_is_started_ever_more_slowly(stage):
    slow = Timing(backoff_first_seconds=0.05, backoff_limit_seconds=60, backoff_reset_seconds=60)

    async def script():
        await until(lambda: stage.announced)
        stage.does("host", "die")
        os.kill(stage.pids("host go")[0], signal.SIGKILL)
        await until(lambda: len(stage.pids("host start")) == 5)
        began = trio.current_time()
        await until(lambda: len(stage.pids("host start")) == 6)
        assert trio.current_time() - began > 0.5  # the fifth wait is 0.8 s, less what was seen late

    running(stage.supervisor(timing=slow), script)


@pytest.mark.parametrize(
    ("behaviour", "text", "usage"),
    [
        ("error", "no Server in it", True),
        ("die", "the host 0 ended while it was starting: exit status 3", False),
    ],
)
def test_a_host_that_cannot_load_the_app_at_start_stops_everything(stage, behaviour, text, usage):
    stage.does("host", behaviour)

    async def script():
        await trio.sleep_forever()

    with pytest.raises(StartError) as raised:
        running_to_its_end(stage.supervisor())
    assert str(raised.value) == text and raised.value.usage is usage
    assert not stage.announced


def running_to_its_end(supervisor: Supervisor) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            await supervisor.run()

    trio.run(main)


def test_an_app_that_hangs_when_imported_is_given_up_in_time(stage):
    stage.does("host", "hang")
    with pytest.raises(StartError, match=r"did not start within 0\.5 s") as raised:
        running_to_its_end(stage.supervisor(timing=Timing(load_seconds=0.5)))
    assert raised.value.usage


def test_a_gateway_that_cannot_start_stops_everything(stage):
    stage.does("gateway", "error")
    with pytest.raises(StartError, match="no Server in it") as raised:
        running_to_its_end(stage.supervisor())
    assert not raised.value.usage


def test_a_program_that_does_not_exist_is_an_error_and_no_crash(stage):
    plan = Plan(app="a", data=stage.folder, listener=stage.listener, settings=Settings())
    commands = Commands(gateway=("/nowhere/gateway",), host=("/nowhere/host",))
    with pytest.raises(StartError, match="cannot be started"):
        running_to_its_end(Supervisor(plan, announce=stage.announced.append, commands=commands))


def test_a_host_that_ignores_the_request_to_stop_is_killed_in_time(stage):
    """FAULTS 71: a bounded exit."""
    stage.does("host", "stubborn")

    async def script():
        await until(lambda: stage.announced)

    began = time.monotonic()
    running(stage.supervisor(timing=Timing(finish_seconds=0.3)), script)
    assert time.monotonic() - began < 10
    assert "host term" in stage.journal


def test_the_second_request_to_stop_kills_at_once(stage):
    stage.does("gateway", "stubborn")
    stage.does("host", "stubborn")
    supervisor = stage.supervisor(timing=Timing(drain_seconds=600, finish_seconds=600))

    async def script():
        await until(lambda: stage.announced)
        supervisor.request_stop()
        await until(lambda: "gateway term" in stage.journal)
        supervisor.request_stop()

    running(supervisor, script)
    assert "host term" not in stage.journal  # killed without being asked


# Reload


class Saves:
    """Stands for the file watcher."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[None](16)

    async def __call__(self) -> AsyncIterator[Collection[object]]:
        yield ()
        async for _ in self._receive:
            yield ("chat.py",)

    def save(self) -> None:
        self._send.send_nowait(None)


def test_reload_swaps_only_after_the_new_code_is_loaded_and_the_old_has_exited(stage):
    """S5, S32: never two hosts with one shard, never none because of bad timing."""
    saves = Saves()

    async def script():
        await until(lambda: stage.announced)
        old = stage.pids("host go")[0]
        stage.does("host", "hang")
        saves.save()
        await until(lambda: len(stage.pids("host start")) == 2)
        assert "host term" not in stage.journal  # the old one serves while the new one loads
        stage.does("host")
        saves.save()  # the hanging one is given up for the newest code
        await until(lambda: len(stage.pids("host go")) == 2)
        assert started_at_ticks(old) is None
        assert started_at_ticks(stage.pids("host start")[1]) is None

    running(stage.supervisor(changes=saves), script)
    lines = [line for line in stage.journal if line.startswith("host")]
    assert lines == ["host start", "host go", "host start", "host start", "host term", "host go", "host term"]
    assert stage.journal.count("gateway start") == 1


def test_code_that_does_not_load_leaves_the_old_running(stage, capfd):
    """FAULTS 67: named, and going back works."""
    saves = Saves()

    async def script():
        await until(lambda: stage.announced)
        stage.does("host", "error")
        saves.save()
        await until(lambda: len(stage.pids("host start")) == 2)
        await until(lambda: started_at_ticks(stage.pids("host start")[1]) is None)
        assert "host term" not in stage.journal
        assert started_at_ticks(stage.pids("host go")[0]) is not None
        stage.does("host")
        saves.save()
        await until(lambda: len(stage.pids("host go")) == 2)

    running(stage.supervisor(changes=saves), script)
    captured = capfd.readouterr()
    assert "no Server in it" in captured.out + captured.err


def test_a_save_before_the_code_is_loaded_is_not_missed(stage):
    saves = Saves()
    saves.save()

    async def script():
        await until(lambda: len(stage.pids("host go")) == 2)

    running(stage.supervisor(changes=saves), script)


def test_a_folder_that_cannot_be_watched_is_served_all_the_same(stage):
    async def changes():
        await trio.lowlevel.checkpoint()
        if stage.folder.exists():
            raise OSError("no more watches")
        yield ()

    async def script():
        await until(lambda: stage.announced)

    running(stage.supervisor(changes=changes), script)


def test_a_save_ends_the_wait_of_a_host_that_keeps_dying(stage):
    saves = Saves()
    slow = Timing(backoff_first_seconds=600, backoff_limit_seconds=600)

    async def script():
        await until(lambda: stage.announced)
        os.kill(stage.pids("host go")[0], signal.SIGKILL)
        await until(lambda: started_at_ticks(stage.pids("host go")[0]) is None)
        saves.save()
        await until(lambda: len(stage.pids("host go")) == 2)

    running(stage.supervisor(changes=saves, timing=slow), script)


# The real process and real signals

PROGRAM = """
import sys, trio
from pathlib import Path
sys.path[:0] = [{root!r}]
from hibernation.children import Commands, Timing
from hibernation.listener import bind_listener
from hibernation.settings import Settings
from hibernation.supervisor import Plan, Supervisor
from storage.directory import socket_path
from storage.errors import DataDirectoryError
folder = Path({folder!r})
plan = Plan(app="a", data=folder, listener=bind_listener("127.0.0.1", 0, receive_buffer_bytes=131072),
            settings=Settings())
commands = Commands(gateway={gateway!r}, host={host!r})
supervisor = Supervisor(plan, announce=lambda address: print("ready", flush=True), commands=commands,
                        timing=Timing(drain_seconds=600, finish_seconds=600))
trio.run(supervisor.run)
"""


@pytest.fixture
def program(stage):
    """Start a supervisor as a process of its own; whatever happens, nothing is left running."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        text = PROGRAM.format(
            root=os.getcwd(),
            folder=str(stage.folder),
            gateway=stage.commands.gateway,
            host=stage.commands.host,
        )
        process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    for _, pid in ProcessList(stage.folder).surviving():
        os.kill(pid, signal.SIGKILL)
    settled(lambda: not ProcessList(stage.folder).surviving())


def settled(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_stops_with_status_0(stage, program, number):
    process = program()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(20) == 0
    assert [line for line in stage.journal if "term" in line] == ["gateway term", "host term"]


def test_a_second_signal_forces_with_status_0(stage, program):
    """FAULTS 71."""
    stage.does("gateway", "stubborn")
    process = program()
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    settled(lambda: "gateway term" in stage.journal)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_a_signal_while_the_app_is_still_loading_stops_with_status_0(stage, program):
    stage.does("host", "hang")
    process = program()
    settled(lambda: "host start" in stage.journal)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0


def test_the_death_of_the_supervisor_leaves_its_children_serving(stage, program):
    """S34; and a second start names them."""
    process = program()
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.wait()
    gateway, host = stage.pids("gateway start")[0], stage.pids("host go")[0]
    assert started_at_ticks(gateway) is not None and started_at_ticks(host) is not None
    assert sorted(ProcessList(stage.folder).surviving()) == [("gateway", gateway), ("host 0", host)]
    with pytest.raises(StartError, match=rf"still served by .*gateway \(pid {gateway}\).*broker stop"):
        stage.supervisor()


# Its parts


def test_a_port_in_use_is_named():
    with bind_listener("127.0.0.1", 0, receive_buffer_bytes=131072) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(AddressInUse, match=f"port {port} of 127.0.0.1 is in use") as raised:
            bind_listener("127.0.0.1", port, receive_buffer_bytes=131072)
    assert raised.value.port == port


def test_an_address_of_another_machine_is_named():
    with pytest.raises(StartError, match=r"cannot listen on 192\.0\.2\.1:0"):
        bind_listener("192.0.2.1", 0, receive_buffer_bytes=131072)
    with pytest.raises(StartError, match=r"no address is known for 'no\.such\.host\.invalid'"):
        bind_listener("no.such.host.invalid", 0, receive_buffer_bytes=131072)


def test_accepted_sockets_inherit_the_receive_buffer():
    with bind_listener("127.0.0.1", 0, receive_buffer_bytes=65536) as listener:
        # socket(7): the kernel doubles the value for its own bookkeeping.
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 2 * 65536


def test_a_data_directory_too_deep_for_a_unix_socket_is_refused_at_start(stage):
    """FAULTS 41."""
    deep = stage.folder / ("d" * 108)
    plan = Plan(app="a", data=deep, listener=stage.listener, settings=Settings())
    with pytest.raises(DataDirectoryError, match="Unix socket"):
        Supervisor(plan, announce=stage.announced.append)


def test_the_list_of_processes_does_not_mistake_a_number_for_a_process(tmp_path):
    listed = ProcessList(tmp_path)
    assert listed.surviving() == []
    listed.write([("me", os.getpid())])
    assert listed.surviving() == [("me", os.getpid())]
    assert (tmp_path / "processes.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "processes.json").write_text(json.dumps([["me", os.getpid(), 1]]))
    assert listed.surviving() == []
    (tmp_path / "processes.json").write_text("{")
    assert listed.surviving() == []
    listed.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_report_is_one_line():
    line = encode_report("error", text="two\nlines")
    assert line.count(b"\n") == 1 and json.loads(line) == {"event": "error", "text": "two\nlines"}
