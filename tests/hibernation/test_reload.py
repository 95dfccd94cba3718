"""`broker reload`: all new hosts are loaded and checked before any takes a place (S32)."""

import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Collection
from dataclasses import replace

import pytest
import trio

from hibernation.processes import started_at_ticks
from tests.hibernation.stage import QUICK, FakeGateway, Stage, order, refused, running, set_seconds, until


@pytest.fixture
def gateway(stage: Stage) -> FakeGateway:
    return FakeGateway(stage)


async def both_go(stage: Stage) -> list[int]:
    await until(lambda: stage.announced and len(stage.pids("host go")) == 2)
    return stage.pids("host go")


def test_places_change_hands_one_after_the_other(stage, gateway):
    async def script():
        before = await both_go(stage)
        answer = await order(stage.folder, "reload")
        await until(lambda: len(stage.pids("host go")) == 4)
        assert sorted(answer["hosts"]) == sorted(stage.pids("host go")[2:]) and answer["seconds"] > 0
        assert answer["new_parties"] == answer["gone_parties"] == []
        assert not any(started_at_ticks(pid) for pid in before)

    running(stage.supervisor(hosts=2, connect=gateway), script)
    lines = [line for line in stage.journal if line.startswith("host")]
    # Both are started and loaded before the first old one is asked to stop; the words of different processes
    # may be written down in another order than they were said.
    assert sorted(lines[:6]) == ["host go"] * 2 + ["host start"] * 4
    assert lines[6] == "host term" and sorted(lines[6:10]) == ["host go"] * 2 + ["host term"] * 2


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("error", "no Server in it"),
        ("die", "ended while it was starting: exit status 3"),
        ("hang", "did not start within 0.5 s"),
    ],
)
def test_code_that_does_not_load_changes_nothing(stage, gateway, behaviour, text):
    """FAULTS 67."""

    async def script():
        before = await both_go(stage)
        stage.does("host", behaviour)
        if behaviour == "hang":
            set_seconds(timing, "load", 0.5)
        with refused(text):
            await order(stage.folder, "reload")
        assert "host term" not in stage.journal
        assert all(started_at_ticks(pid) for pid in before)
        failed = set(stage.pids("host start")) - set(before)
        assert failed and not any(started_at_ticks(pid) for pid in failed)
        stage.does("host")
        set_seconds(timing, "load", QUICK.load_seconds)
        await order(stage.folder, "reload")

    timing = replace(QUICK)
    running(stage.supervisor(hosts=2, connect=gateway, timing=timing), script)


def test_hosts_that_loaded_different_code_are_refused(stage, gateway):
    async def script():
        before = await both_go(stage)
        stage.does("host", "own-parties")
        with refused("the app changed while it was being loaded"):
            await order(stage.folder, "reload")
        assert all(started_at_ticks(pid) for pid in before)

    running(stage.supervisor(hosts=2, connect=gateway), script)


def test_parties_that_come_and_go_are_said(stage, gateway):
    async def script():
        await until(stage.is_up)
        (stage.folder / "parties").write_text("game lobby")
        answer = await order(stage.folder, "reload")
        assert (answer["new_parties"], answer["gone_parties"]) == (["game", "lobby"], ["chat"])

    running(stage.supervisor(connect=gateway), script)


def test_a_reload_returns_when_the_gateway_has_the_new_hosts(stage, gateway):
    asked = 0

    def stats() -> dict[str, list[int]]:
        nonlocal asked
        asked += 1
        return {"hosts": stage.pids("host start") if asked > 3 else []}

    gateway.answers["stats"] = stats

    async def script():
        await until(stage.is_up)
        await order(stage.folder, "reload")
        assert asked == 4

    running(stage.supervisor(connect=gateway), script)


def test_a_reload_whose_hosts_never_reach_the_gateway_says_so(stage, gateway):
    gateway.answers["stats"] = {"hosts": []}

    timing = replace(QUICK)

    async def script():
        await until(stage.is_up)
        stage.does("host")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reloading)
            await until(lambda: stage.pids("host term"))
            set_seconds(timing, "load", 0.3)  # all are loaded, now the gateway's links are waited for
            os.kill(stage.pids("host start")[0], signal.SIGKILL)

    async def reloading():
        with refused("the new code runs, but the gateway does not have all its hosts"):
            await order(stage.folder, "reload")

    stage.does("host", "stubborn")
    running(stage.supervisor(connect=gateway, timing=timing), script)


def test_a_loaded_host_that_dies_before_its_turn_leaves_its_place_to_a_living_one(stage, gateway):
    """The old host is stubborn: while its exit is awaited the new one is killed."""
    stage.does("host", "stubborn")

    async def script():
        await until(stage.is_up)
        [old] = stage.pids("host go")

        async def kill_the_new_one_then_the_old() -> None:
            await until(lambda: stage.pids("host term"))
            new = stage.pids("host start")[1]
            os.kill(new, signal.SIGKILL)
            # Its death is known when the list, which is written anew then, is without it.
            await until(lambda: new not in [pid for _, pid, _ in stage.read("processes.json")])
            stage.does("host")
            os.kill(old, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_the_new_one_then_the_old)
            with refused("the new host 0 ended before its turn: killed by SIGKILL"):
                await order(stage.folder, "reload")
        await until(lambda: len(stage.pids("host go")) == 2)
        assert started_at_ticks(old) is None

    running(stage.supervisor(connect=gateway), script)


def test_a_host_that_dies_while_new_ones_load_is_replaced_by_the_reload(stage, gateway):
    """Two loads of one index at once: one of them takes the place, the other is killed."""

    async def script():
        await until(stage.is_up)
        [old] = stage.pids("host go")
        stage.does("host", "slow")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(order, stage.folder, "reload")
            await until(lambda: len(stage.pids("host start")) == 2)
            os.kill(old, signal.SIGKILL)
        await until(lambda: sum(started_at_ticks(pid) is not None for pid in stage.pids("host start")) == 1)
        assert [pid for pid in stage.pids("host go") if started_at_ticks(pid)] == stage.listed("host 0")

    running(stage.supervisor(connect=gateway), script)


def test_a_stop_in_a_reload_waits_for_the_place_that_changes_hands(stage, gateway):
    """FAULTS 71: the close turns of the sockets find a host for every shard."""
    stage.does("host", "stubborn")
    stage.does("gateway", "stubborn")
    supervisor = stage.supervisor(connect=gateway)

    async def script():
        await until(stage.is_up)
        [old] = stage.pids("host go")
        stage.does("host")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupted)
            await until(lambda: stage.pids("host term"))
            supervisor.request_stop()
            os.kill(old, signal.SIGKILL)
            await until(lambda: len(stage.pids("host go")) == 2)
            await until(lambda: stage.pids("gateway term"))
            os.kill(stage.pids("gateway start")[0], signal.SIGKILL)
        await until(lambda: stage.pids("keeper term"))

    async def interrupted():
        with refused("the instance is being stopped"):
            await order(stage.folder, "reload")

    running(supervisor, script)
    lines = [line for line in stage.journal if line.split()[1] in ("go", "term")]
    assert lines[:2] == ["host go", "host term"]
    # Two processes write down what they were told one right after the other.
    assert sorted(lines[2:4]) == ["gateway term", "host go"]
    assert lines[4:] == ["host term", "keeper term"]


def test_a_reload_holds_up_a_stop_no_longer_than_that_may_take(stage, gateway):
    """FAULTS 71: also where the old host has an hour."""
    stage.does("host", "stubborn")
    timing = replace(QUICK, drain_seconds=1, finish_seconds=600, alone_seconds=0.1)
    supervisor = stage.supervisor(connect=gateway, timing=timing)

    async def script():
        await until(stage.is_up)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupted)
            await until(lambda: stage.pids("host term"))
            supervisor.request_stop()
        await until(lambda: stage.pids("keeper term"))

    async def interrupted():
        with refused("the old host 0 did not end"):
            await order(stage.folder, "reload")

    running(supervisor, script)
    stage.assert_all_ended()


def test_an_order_waits_for_a_reload_after_a_save_no_longer_than_to_be_told(stage, gateway):
    stage.does("host")
    send, receive = trio.open_memory_channel[None](1)

    async def changes() -> AsyncIterator[Collection[object]]:
        yield ()
        async for _ in receive:
            yield ("chat.py",)

    async def script():
        await until(stage.is_up)
        stage.does("host", "hang")
        await send.send(None)
        await until(lambda: len(stage.pids("host start")) == 2)
        with refused("reload is under way, for"):
            await order(stage.folder, "reload")

    running(stage.supervisor(connect=gateway, changes=changes), script)


def test_an_unknown_order_is_named(stage):
    async def script():
        await until(stage.is_up)
        with refused("unknown command 'dance'; there are: reload, upgrade, drain"):
            await order(stage.folder, "dance")

    running(stage.supervisor(), script)


# Signs of life


def test_a_child_that_has_beaten_and_stops_is_killed_and_started_again(stage):
    """S5, S23: its exit is awaited before another one has its shards."""
    (stage.folder / "alive").touch()
    stage.does("host", "beat")
    stage.does("gateway", "pulse")

    async def script():
        await until(stage.is_up)
        [hung] = stage.pids("host go")
        (stage.folder / "alive").unlink()
        await until(lambda: stage.pids("host silent"))
        stage.does("host")
        await until(lambda: len(stage.pids("host go")) == 2)
        assert started_at_ticks(hung) is None

    running(stage.supervisor(timing=replace(QUICK, hang_seconds=2)), script)
    assert "host term" not in stage.journal[: stage.journal.index("host silent") + 2]


def test_a_stopped_child_is_killed(stage):
    """FAULTS 5."""
    (stage.folder / "alive").touch()
    stage.does("gateway", "beat")

    async def script():
        await until(stage.is_up)
        [stopped] = stage.pids("gateway start")
        os.kill(stopped, signal.SIGSTOP)
        await until(lambda: len(stage.pids("gateway start")) == 2)
        assert started_at_ticks(stopped) is None

    running(stage.supervisor(timing=replace(QUICK, hang_seconds=2)), script)


def test_a_gateway_that_is_ready_and_never_beats_is_killed(stage):
    """One that is stopped in its first second is not overlooked."""

    async def script():
        await until(lambda: len(stage.pids("gateway start")) >= 2)
        assert started_at_ticks(stage.pids("gateway start")[0]) is None

    running(stage.supervisor(timing=replace(QUICK, hang_seconds=0.5)), script)


def test_a_host_that_was_told_to_go_and_never_beats_is_killed(stage):
    stage.does("gateway", "pulse")

    async def script():
        await until(stage.is_up)
        await until(lambda: len(stage.pids("host go")) >= 2)

    running(stage.supervisor(timing=replace(QUICK, hang_seconds=0.5, load_seconds=4)), script)


def test_a_child_that_beats_or_has_time_to_begin_is_left_alone(stage):
    stage.does("gateway", "pulse")
    supervisor = stage.supervisor(timing=replace(QUICK, hang_seconds=2))

    async def script():
        await until(stage.is_up)
        await trio.sleep(3)  # nothing is to happen
        for child in supervisor._children._running:
            assert "beat" not in getattr(child, "reports", {})

    running(supervisor, script)
    assert stage.journal.count("gateway start") == stage.journal.count("host start") == 1


def test_nobody_is_judged_for_a_time_in_which_the_supervisor_stood_still(stage):
    stage.does("gateway", "pulse")

    async def script():
        await until(stage.is_up)
        [gateway] = stage.pids("gateway start")
        os.kill(gateway, signal.SIGSTOP)
        time.sleep(3)  # as when the whole machine is suspended
        os.kill(gateway, signal.SIGCONT)
        await trio.sleep(1.0)  # nothing is to happen
        assert started_at_ticks(gateway) is not None

    running(stage.supervisor(timing=replace(QUICK, hang_seconds=2)), script)


# The keeper


def test_the_keeper_comes_first_and_is_started_again_at_once(stage):
    slow = replace(QUICK, backoff_first_seconds=600, backoff_limit_seconds=600)

    async def script():
        await until(stage.is_up)
        assert stage.journal[0] == "keeper start"
        [first] = stage.listed("keeper")
        os.kill(first, signal.SIGKILL)
        await until(lambda: len(stage.pids("keeper start")) == 2)
        [second] = stage.listed("keeper")
        listener = os.fstat(stage.listener.fileno()).st_ino
        await until(lambda: holds(second, listener))

    running(stage.supervisor(timing=slow), script)
    assert stage.journal.count("gateway start") == stage.journal.count("host start") == 1


def test_a_keeper_that_does_not_answer_is_killed(stage):
    stage.does("gateway", "pulse")

    async def script():
        await until(stage.is_up)
        [first] = stage.listed("keeper")
        listener = os.fstat(stage.listener.fileno()).st_ino
        await until(lambda: holds(first, listener))
        os.kill(first, signal.SIGSTOP)
        await until(lambda: len(stage.pids("keeper start")) == 2)
        assert started_at_ticks(first) is None

    running(stage.supervisor(timing=replace(QUICK, hang_seconds=0.5, keeper_seconds=2)), script)


def holds(pid: int, inode: int) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                return True
    return False
