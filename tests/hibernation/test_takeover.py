"""A supervisor takes over what another one, which was killed, has left behind (S34)."""

import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace

import pytest
import trio

from hibernation.admin import NoSupervisor, SupervisorClient, stop
from hibernation.children import START_TRIES
from hibernation.gateway_line import LineError
from hibernation.listener import StartError
from hibernation.processes import ProcessList, started_at_ticks
from tests.hibernation.stage import (
    QUICK,
    FakeGateway,
    Stage,
    running,
    running_to_its_end,
    settled,
    until,
)

Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def gateway(stage: Stage) -> FakeGateway:
    return FakeGateway(stage)


def left_behind(stage: Stage, program: Program, hosts: int = 1) -> tuple[str, int]:
    """Start an instance, and kill its supervisor; gives the address."""
    process = program(hosts)
    assert process.stdout is not None
    _, host, port = process.stdout.readline().split()
    settled(lambda: len(stage.pids("host go")) == hosts)
    process.kill()
    process.wait()
    return host, int(port)


def lives(pid: int) -> bool:
    return started_at_ticks(pid) is not None


def test_the_death_of_the_supervisor_leaves_its_children_serving(stage, program):
    left_behind(stage, program)
    gateway, host, keeper = (stage.pids(f"{kind} start")[0] for kind in ("gateway", "host", "keeper"))
    assert lives(gateway) and lives(host) and lives(keeper)
    assert sorted(ProcessList(stage.folder).surviving()) == [
        ("gateway", gateway),
        ("host 0", host),
        ("keeper", keeper),
    ]
    with pytest.raises(NoSupervisor, match="broker serve on the same directory takes that over"):
        SupervisorClient(stage.folder)


def test_stop_without_a_supervisor_ends_gateway_hosts_and_keeper_in_this_order(stage, program):
    left_behind(stage, program, hosts=2)
    stop(stage.folder)
    stage.assert_all_ended()
    assert [line for line in stage.journal if "term" in line] == [
        "gateway term",
        "host term",
        "host term",
        "keeper term",
    ]


@pytest.mark.parametrize("kind", ["gateway", "host"])
def test_what_is_killed_whenever_it_starts_is_no_reason_to_give_up(
    stage, program, gateway, kind, monkeypatch
):
    """S34: the sockets in the keeper wait; giving up would close them."""
    monkeypatch.setattr("hibernation.children.PATIENCE_SECONDS", 0.01)
    left_behind(stage, program)
    keeper = stage.pids("keeper start")[0]
    os.kill(stage.pids("gateway start")[0], signal.SIGKILL)
    stage.does(kind, "killed")
    before = len(stage.pids(f"{kind} start"))

    async def script():
        await until(lambda: len(stage.pids(f"{kind} start")) >= before + START_TRIES + 2)
        stage.does(kind)
        await until(lambda: stage.announced)
        assert stage.listed("keeper") == [keeper]

    running(stage.supervisor(connect=gateway, listens=False), script)


@pytest.mark.parametrize("hosts", [1, 2, 3])
def test_hosts_and_gateway_are_replaced_and_the_keeper_and_its_listener_stay(stage, program, gateway, hosts):
    """The number of hosts may change: so all old ones have exited before the first new one goes."""
    address = left_behind(stage, program, hosts=2)
    keeper, old_gateway = stage.pids("keeper start")[0], stage.pids("gateway start")[0]
    old_hosts = stage.pids("host go")

    async def script():
        await until(lambda: stage.announced)
        await until(lambda: len(stage.pids("host go")) == 2 + hosts)
        assert stage.announced == [address]
        assert stage.listed("keeper") == [keeper] and stage.journal.count("keeper start") == 1
        assert gateway.asked == ["freeze", "leave"]
        await until(lambda: not lives(old_gateway))
        assert not any(lives(pid) for pid in old_hosts)
        assert stage.listed("gateway") == stage.pids("spare go")
        # What was taken over is looked after.
        os.kill(keeper, signal.SIGKILL)
        os.kill(stage.listed("gateway")[0], signal.SIGKILL)
        os.kill(stage.listed("host 0")[0], signal.SIGKILL)
        await until(lambda: len(stage.pids("gateway start")) == 2)
        await until(lambda: len(stage.pids("keeper start")) == 2)
        await until(lambda: len(stage.pids("host go")) == 3 + hosts)

    running(stage.supervisor(connect=gateway, listens=False, hosts=hosts), script)
    lines = [line for line in stage.journal if line in ("host go", "host term")]
    assert lines[:4] == ["host go", "host go", "host term", "host term"]
    stage.assert_all_ended()


@pytest.mark.parametrize("behaviour", ["error", "die", "hang"])
def test_new_hosts_that_do_not_load_leave_everything_as_it_was(stage, program, gateway, behaviour):
    left_behind(stage, program)
    before = sorted(ProcessList(stage.folder).surviving())
    stage.does("host", behaviour)
    with pytest.raises(StartError):
        running_to_its_end(
            stage.supervisor(connect=gateway, listens=False, timing=replace(QUICK, load_seconds=0.5))
        )
    assert sorted(ProcessList(stage.folder).surviving()) == before
    assert gateway.asked == [] and "term" not in str(stage.journal)
    stage.does("host")

    async def script():
        await until(lambda: stage.announced)

    running(stage.supervisor(connect=gateway, listens=False), script)


def test_a_gateway_that_cannot_be_replaced_stays_and_is_looked_after(stage, program, gateway):
    left_behind(stage, program)
    gateway.answers["freeze"] = LineError("the gateway refused 'freeze': it is older", broken=False)
    [old] = stage.pids("gateway start")

    async def script():
        await until(lambda: stage.announced)
        assert stage.listed("gateway") == [old]
        os.kill(old, signal.SIGKILL)
        await until(lambda: len(stage.pids("gateway start")) == 2)

    running(stage.supervisor(connect=gateway, listens=False), script)


def test_a_stop_ends_what_was_taken_over_too(stage, program, gateway):
    left_behind(stage, program)
    gateway.answers["freeze"] = LineError("the gateway refused 'freeze': it is older", broken=False)

    async def script():
        await until(lambda: stage.announced)

    running(stage.supervisor(connect=gateway, listens=False), script)
    stage.assert_all_ended()
    assert [line for line in stage.journal if "term" in line][1:] == [
        "gateway term",
        "host term",
        "keeper term",
    ]
    assert not ProcessList(stage.folder).surviving()


def test_a_dead_gateway_is_started_when_the_new_hosts_are_loaded(stage, program, gateway):
    left_behind(stage, program)
    [old] = stage.pids("gateway start")
    os.kill(old, signal.SIGKILL)
    settled(lambda: not lives(old))

    async def script():
        await until(lambda: stage.announced)
        assert gateway.asked == []

    running(stage.supervisor(connect=gateway, listens=False), script)
    lines = [line for line in stage.journal if line in ("host start", "gateway start")]
    assert lines[-2:] == ["host start", "gateway start"]


def test_a_gateway_that_hangs_is_killed_when_the_new_hosts_are_loaded(stage, program, gateway):
    left_behind(stage, program)
    [old] = stage.pids("gateway start")
    os.kill(old, signal.SIGSTOP)
    gateway.answers["stats"] = trio.sleep_forever

    async def script():
        await until(lambda: stage.announced)
        await until(lambda: not lives(old))
        assert len(stage.pids("gateway start")) == 2

    timing = replace(QUICK, freeze_seconds=0.3, resume_seconds=0.3)
    running(stage.supervisor(connect=gateway, listens=False, timing=timing), script)


def test_a_hung_keeper_is_killed_and_the_listener_sought_from_the_gateway(stage, program, gateway):
    """Here the gateway, a stand-in, gives none; and still has it: the remedy is named."""
    host, port = left_behind(stage, program)
    [keeper] = stage.pids("keeper start")
    os.kill(keeper, signal.SIGSTOP)
    [old] = stage.pids("gateway start")
    with pytest.raises(StartError, match=rf"port {port} .*in use.*process {old}.*broker stop --data"):
        running_to_its_end(
            stage.supervisor(
                connect=gateway,
                listens=False,
                bind=(host, port),
                timing=replace(QUICK, keeper_seconds=0.3),
            )
        )
    assert not lives(keeper) and lives(old)
    assert [name for name, _ in sorted(ProcessList(stage.folder).surviving())] == ["gateway", "host 0"]


def test_another_address_is_refused_with_the_remedy(stage, program, gateway):
    _, port = left_behind(stage, program)
    before = sorted(ProcessList(stage.folder).surviving())
    with pytest.raises(StartError, match=rf"listens at 127\.0\.0\.1 port {port}, .*broker stop"):
        running_to_its_end(
            stage.supervisor(connect=gateway, listens=False, bind=("127.0.0.1", port % 65535 + 1))
        )
    assert sorted(ProcessList(stage.folder).surviving()) == before


def test_a_takeover_of_a_takeover(stage, program, gateway):
    """FAULTS 4: twice in a row, the second time in the middle of the first."""
    left_behind(stage, program)
    stage.does("host", "hang")
    interrupted = program(takes_over=True)
    settled(lambda: len(stage.pids("host start")) == 2)
    interrupted.kill()
    interrupted.wait()
    stage.does("host")
    # What was loading has nothing to wait for any more.
    settled(lambda: len(ProcessList(stage.folder).surviving()) >= 3)

    async def script():
        await until(lambda: stage.announced)
        await until(lambda: len(stage.listed("host 0")) == 1)

    running(stage.supervisor(connect=gateway, listens=False), script)
    stage.assert_all_ended()


def test_two_gateways_of_an_interrupted_upgrade_become_one(stage, program, gateway):
    """The one that answers is the gateway; the other is given its time to leave, and is killed."""
    left_behind(stage, program)
    [serving] = stage.pids("gateway start")
    frozen = subprocess.Popen(["sleep", "600"])
    listed = ProcessList(stage.folder)
    listed.write([*listed.surviving(), ("gateway", frozen.pid)])
    assert gateway.stage.listed("gateway")[0] == serving

    async def script():
        await until(lambda: stage.announced)
        await until(lambda: frozen.poll() is not None)
        assert gateway.asked == ["freeze", "leave"]

    running(
        stage.supervisor(connect=gateway, listens=False, timing=replace(QUICK, resume_seconds=0.3)), script
    )
    assert frozen.returncode == -signal.SIGKILL
