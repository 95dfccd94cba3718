"""The supervisor, with tiny scripts in the place of gateway and host: restart, back-off, signals, reload."""

import json
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from hibernation.children import Backoff
from hibernation.configuration import GatewayConfig, HostConfig, encode_report, report
from hibernation.listener import AddressInUse, StartError, bind_listener, require_address
from hibernation.plan import Commands, Timing
from hibernation.processes import ProcessList, started_at_ticks
from hibernation.settings import Settings
from hibernation.supervisor import Plan, Supervisor
from storage.directory import socket_path
from storage.errors import DataDirectoryError
from tests.hibernation.stage import (
    QUICK,
    Stage,
    running,
    running_to_its_end,
    set_seconds,
    settled,
    until,
)


def more_than(stage: Stage, known: int) -> bool:
    return len(stage.pids("host go")) > known


def test_ready_is_announced_once_the_gateway_answers_and_the_app_is_loaded(stage):
    async def script():
        await until(stage.is_up)
        await until(lambda: stage.pids("host go"))
        assert stage.pids("gateway start")

    running(stage.supervisor(), script)
    assert stage.announced == [stage.listener.getsockname()]


def test_the_gateway_is_stopped_before_the_hosts(stage):
    async def script():
        await until(lambda: "host go" in stage.journal and stage.announced)

    running(stage.supervisor(), script)
    assert [line for line in stage.journal if "term" in line] == ["gateway term", "host term", "keeper term"]


def test_children_get_their_configuration_by_standard_input_and_no_other_descriptor(stage):
    """FAULTS 44, 69: nothing leaks into the children, and nothing stands on their command line."""
    leak = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(leak, True)  # as a library in C may leave it

    async def script():
        await until(stage.is_up)
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
        await until(stage.is_up)
        for _ in range(3):
            before = stage.pids("host go")
            os.kill(before[-1], signal.SIGKILL)
            await until(partial(more_than, stage, len(before)))

    running(stage.supervisor(), script)
    assert stage.journal.count("gateway start") == 1


def test_a_gateway_that_dies_is_started_again_with_the_same_listener(stage):
    async def script():
        await until(stage.is_up)
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
        await until(stage.is_up)
        os.kill(stage.pids("gateway start")[0], signal.SIGKILL)
        with socket.create_connection(stage.listener.getsockname(), timeout=20):
            await until(lambda: len(stage.pids("gateway start")) == 2)

    running(stage.supervisor(), script)


def test_back_off_doubles_to_its_limit_and_begins_again_after_a_long_life():
    backoff = Backoff(Timing(backoff_reset_seconds=10))
    assert [backoff.delay(0.0) for _ in range(9)] == pytest.approx(
        [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    )
    assert backoff.delay(9.999) == 10.0
    assert backoff.delay(10.0) == 0.1
    assert backoff.delay(0.0) == 0.2


def test_a_host_that_always_dies_is_started_ever_more_slowly(stage):
    slow = Timing(backoff_first_seconds=0.05, backoff_limit_seconds=60, backoff_reset_seconds=60)

    async def script():
        await until(stage.is_up)
        stage.does("host", "die")
        began = trio.current_time()
        os.kill(stage.pids("host go")[0], signal.SIGKILL)
        await until(lambda: len(stage.pids("host start")) == 6)
        assert trio.current_time() - began >= 0.05 + 0.1 + 0.2 + 0.4 + 0.8

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


def test_an_app_that_hangs_when_imported_is_given_up_in_time(stage):
    stage.does("host", "hang")
    timing = replace(QUICK)

    async def changes():
        set_seconds(timing, "load", 1)  # the keeper, for which it is a deadline too, has been started
        yield ()

    with pytest.raises(StartError, match=r"the host 0 did not start within 1 s") as raised:
        running_to_its_end(stage.supervisor(timing=timing, changes=changes))
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
        await until(stage.is_up)

    running(stage.supervisor(timing=replace(QUICK, drain_seconds=600, finish_seconds=2)), script)
    assert "host term" in stage.journal


def test_gateway_and_hosts_share_the_time_that_a_stop_may_take(stage):
    """FAULTS 71: those who come last have a little of their own, whatever the others have taken."""
    stage.does("gateway", "stubborn")
    stage.does("host", "stubborn")
    timing = Timing(drain_seconds=0.5, finish_seconds=600, alone_seconds=0.1)

    async def script():
        await until(stage.is_up)

    running(stage.supervisor(timing=timing), script)
    asked = [line for line in stage.journal if line.endswith("term")]
    assert asked == ["gateway term", "host term", "keeper term"]


def test_a_host_is_told_that_its_time_is_nearly_over(stage, capsys):
    """FAULTS 71: it cannot know how much of the time the gateway has taken."""
    stage.does("host", "slow-to-stop")

    async def script():
        await until(stage.is_up)

    timing = replace(QUICK, drain_seconds=600, finish_seconds=40, hurry_seconds=39)
    running(stage.supervisor(timing=timing), script)
    asked = [line for line in stage.journal if line.endswith("term")]
    assert asked == ["gateway term", "host term", "host term", "keeper term"]
    said = capsys.readouterr()
    assert "killed" not in said.out + said.err


def test_the_log_names_whom_a_stop_waits_for(stage, capsys):
    stage.does("host", "stubborn")

    async def script():
        await until(stage.is_up)

    running(stage.supervisor(timing=Timing(finish_seconds=1.5)), script)
    said = capsys.readouterr()
    assert re.search(r"waiting for the end of a process.*host 0", said.out + said.err)


def test_the_second_request_to_stop_kills_at_once(stage):
    stage.does("gateway", "stubborn")
    stage.does("host", "stubborn")
    supervisor = stage.supervisor(timing=Timing(drain_seconds=600, finish_seconds=600))

    async def script():
        await until(stage.is_up)
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
        await until(stage.is_up)
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
    printed: list[str] = []

    def is_named() -> bool:
        printed.extend(capfd.readouterr())
        return "no Server in it" in "".join(printed)

    async def script():
        await until(stage.is_up)
        stage.does("host", "error")
        saves.save()
        await until(lambda: len(stage.pids("host start")) == 2)
        await until(is_named)  # not before: a save while it loads is one of newer code
        assert started_at_ticks(stage.pids("host start")[1]) is None
        assert "host term" not in stage.journal
        assert started_at_ticks(stage.pids("host go")[0]) is not None
        stage.does("host")
        saves.save()
        await until(lambda: len(stage.pids("host go")) == 2)

    running(stage.supervisor(changes=saves), script)


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
        await until(stage.is_up)

    running(stage.supervisor(changes=changes), script)


def test_a_save_ends_the_wait_of_a_host_that_keeps_dying(stage):
    saves = Saves()
    slow = Timing(backoff_first_seconds=600, backoff_limit_seconds=600)

    async def script():
        await until(stage.is_up)
        os.kill(stage.pids("host go")[0], signal.SIGKILL)
        await until(lambda: started_at_ticks(stage.pids("host go")[0]) is None)
        saves.save()
        await until(lambda: len(stage.pids("host go")) == 2)

    running(stage.supervisor(changes=saves, timing=slow), script)


# The real process and real signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_drains_and_stops_with_status_0(stage, program, number):
    process = program()
    assert process.stdout.readline().startswith("ready ")
    process.send_signal(number)
    assert process.wait(60) == 0
    assert [line for line in stage.journal if "term" in line] == ["gateway term", "host term", "keeper term"]


def test_a_second_signal_forces_with_status_0(stage, program):
    """FAULTS 71."""
    stage.does("gateway", "stubborn")
    process = program()
    assert process.stdout.readline().startswith("ready ")
    process.send_signal(signal.SIGTERM)
    settled(lambda: "gateway term" in stage.journal)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_signal_while_the_app_is_still_loading_stops_with_status_0(stage, program):
    stage.does("host", "hang")
    process = program()
    settled(lambda: "host start" in stage.journal)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


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


def test_a_beat_that_finds_no_room_is_left_out(stage):
    """A supervisor that stands still does not stop its children."""
    reading, writing = os.pipe()
    try:
        report(writing, "beat")
        assert json.loads(os.read(reading, 100)) == {"event": "beat"}
        os.set_blocking(writing, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
        report(writing, "beat")  # would wait for ever
    finally:
        os.close(reading)
    report(writing, "beat")  # S34: nobody listens any more
    report(writing, "ready")
    os.close(writing)


def test_what_is_urgent_begins_with_no_wait_and_never_waits_long():
    backoff = Backoff(Timing(), urgent=True)
    assert [backoff.delay(0.0) for _ in range(6)] == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.8, 0.8])
    assert backoff.delay(10.0) == 0.0


def test_a_listener_that_is_taken_over_has_to_be_where_it_is_wanted():
    with bind_listener("127.0.0.1", 0, receive_buffer_bytes=131072) as listener:
        port = listener.getsockname()[1]
        require_address(listener, "127.0.0.1", port)
        require_address(listener, "127.0.0.1", 0)
        for host, wanted in (("127.0.0.1", port % 65535 + 1), ("127.0.0.2", port), ("", port)):
            with pytest.raises(StartError, match=r"give that address, or end it first with broker stop"):
                require_address(listener, host, wanted)
        with pytest.raises(StartError, match="no address is known"):
            require_address(listener, "no.such.host.invalid", port)
