"""One gateway takes another's place: the way it goes, and each way in which it can fail (S33, FAULTS 37)."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from hibernation.gateway_line import LineError
from hibernation.processes import started_at_ticks
from tests.hibernation.stage import QUICK, FakeGateway, Stage, order, refused, running, set_seconds, until


@pytest.fixture
def gateway(stage: Stage) -> FakeGateway:
    return FakeGateway(stage)


def first(stage: Stage) -> int:
    return stage.pids("gateway start")[0]


async def assert_the_old_goes_on(stage: Stage) -> None:
    """It lives and is the gateway, and whoever was to replace it has exited."""
    old = first(stage)
    assert started_at_ticks(old) is not None
    assert "gateway term" not in stage.journal
    await until(lambda: not any(started_at_ticks(pid) for pid in stage.pids("spare start")))
    await until(lambda: stage.listed("gateway") == [old] and not stage.listed("successor"))


def test_an_upgrade_freezes_hands_over_and_dismisses(stage, gateway):
    async def script():
        await until(stage.is_up)
        old = first(stage)
        answer = await order(stage.folder, "upgrade")
        new = stage.pids("spare go")[0]
        assert answer["gateway"] == new and answer["pause_seconds"] > 0
        assert gateway.asked == ["freeze", "leave"]
        await until(lambda: started_at_ticks(old) is None)
        assert stage.listed("gateway") == [new]
        # The one that left is not missed; the one that came is.
        os.kill(new, signal.SIGKILL)
        await until(lambda: len(stage.pids("gateway start")) == 2)

    running(stage.supervisor(connect=gateway), script)
    assert stage.journal.count("gateway start") == 2


def test_the_successor_touches_nothing_before_the_old_one_is_frozen(stage, gateway):
    async def freeze() -> dict[str, bool]:
        await until(lambda: stage.pids("spare start"))
        assert not stage.pids("spare go")
        assert stage.listed("gateway") == [first(stage)] and stage.listed("successor")
        return {"frozen": True}

    gateway.answers["freeze"] = freeze

    async def script():
        await until(stage.is_up)
        await order(stage.folder, "upgrade")
        assert stage.pids("spare go")

    running(stage.supervisor(connect=gateway), script)


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("die", "the successor ended while it was starting: exit status 3; nothing was changed"),
        ("error", "no Server in it; nothing was changed"),
        ("hang", "the successor did not start within 0.5 s; nothing was changed"),
    ],
)
def test_a_successor_that_does_not_load_changes_nothing(stage, gateway, behaviour, text):
    stage.does("spare", behaviour)
    timing = replace(QUICK)

    async def script():
        await until(stage.is_up)
        if behaviour == "hang":
            set_seconds(timing, "load", 0.5)
        with refused(text):
            await order(stage.folder, "upgrade")
        assert gateway.asked == []
        await assert_the_old_goes_on(stage)

    running(stage.supervisor(connect=gateway, timing=timing), script)


@pytest.mark.parametrize(
    ("behaviour", "text"),
    [
        ("die-after-go", "could not take over: exit status 5; the old one goes on"),
        ("error-after-go", "could not take over: no registry; the old one goes on"),
        ("hang-after-go", "was not ready within 0.3 s; the old one goes on"),
    ],
)
def test_a_successor_that_fails_after_the_freeze_is_rolled_back(stage, gateway, behaviour, text):
    """Its exit comes before the old one is resumed: never two."""
    stage.does("spare", behaviour)

    def resume() -> dict[str, bool]:
        assert started_at_ticks(stage.pids("spare go")[0]) is None
        return {"resumed": True}

    gateway.answers["resume"] = resume
    timing = replace(QUICK)

    async def freeze() -> dict[str, bool]:
        if behaviour == "hang-after-go":
            set_seconds(timing, "handover", 0.3)
        return {"frozen": True}

    async def script():
        await until(stage.is_up)
        gateway.answers["freeze"] = freeze
        with refused(text):
            await order(stage.folder, "upgrade")
        assert gateway.asked == ["freeze", "resume"]
        await assert_the_old_goes_on(stage)
        # And again, when what was wrong is mended.
        stage.does("spare")
        gateway.answers["freeze"] = {"frozen": True}
        set_seconds(timing, "handover", QUICK.handover_seconds)
        await order(stage.folder, "upgrade")
        assert gateway.asked[2:] == ["freeze", "leave"]

    running(stage.supervisor(connect=gateway, timing=timing), script)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (trio.sleep_forever, "no answer to 'freeze' within 0.3 s; the old one goes on"),
        (LineError("the gateway refused 'freeze': a disk is full", broken=False), "a disk is full; the old"),
        (LineError("the gateway broke off", broken=True), "the gateway broke off; the old one goes on"),
    ],
)
def test_a_gateway_that_does_not_freeze_goes_on(stage, gateway, answer, text):
    gateway.answers["freeze"] = answer

    async def script():
        await until(stage.is_up)
        with refused(text):
            await order(stage.folder, "upgrade")
        assert gateway.asked == ["freeze", "resume"]
        assert not stage.pids("spare go")
        await assert_the_old_goes_on(stage)

    timing = replace(QUICK, freeze_seconds=0.3) if answer is trio.sleep_forever else QUICK
    running(stage.supervisor(connect=gateway, timing=timing), script)


def test_a_gateway_that_cannot_be_reached_goes_on(stage, gateway):
    async def nobody() -> Any:
        await trio.lowlevel.checkpoint()
        raise LineError("the gateway cannot be reached", broken=True)

    async def script():
        await until(stage.is_up)
        with refused("the gateway cannot be reached; the old one goes on"):
            await order(stage.folder, "upgrade")
        await assert_the_old_goes_on(stage)

    running(stage.supervisor(connect=nobody), script)


def test_a_gateway_that_does_not_resume_is_killed_and_another_started(stage, gateway):
    """The sockets are in the keeper: a gateway in between is worse than a dead one."""
    stage.does("spare", "die-after-go")
    gateway.answers["resume"] = LineError("the gateway broke off", broken=True)
    gateway.answers["stats"] = LineError("nobody answers", broken=False)

    async def script():
        await until(stage.is_up)
        with refused("the old one has ended too, another is started"):
            await order(stage.folder, "upgrade")
        await until(lambda: len(stage.pids("gateway start")) == 2)
        assert started_at_ticks(first(stage)) is None

    running(stage.supervisor(connect=gateway, timing=replace(QUICK, resume_seconds=0.3)), script)


def test_a_gateway_that_resumes_when_its_line_breaks_goes_on(stage, gateway):
    stage.does("spare", "die-after-go")
    gateway.answers["resume"] = LineError("the gateway broke off", broken=True)

    async def script():
        await until(stage.is_up)
        with refused("the old one goes on"):
            await order(stage.folder, "upgrade")
        await assert_the_old_goes_on(stage)

    running(stage.supervisor(connect=gateway), script)


def kill(pid: Callable[[], int]) -> Callable[[], Any]:
    """The process dies before it answers."""

    async def answer() -> Any:
        os.kill(pid(), signal.SIGKILL)
        await until(lambda: started_at_ticks(pid()) is None)
        raise LineError("the gateway broke off", broken=True)

    return answer


def test_when_the_old_one_dies_in_the_freeze_the_successor_takes_over_all_the_same(stage, gateway):
    gateway.answers["freeze"] = kill(partial(first, stage))

    async def script():
        await until(stage.is_up)
        answer = await order(stage.folder, "upgrade")
        assert stage.listed("gateway") == [answer["gateway"]] == stage.pids("spare go")
        assert gateway.asked == ["freeze"]

    running(stage.supervisor(connect=gateway), script)
    assert stage.journal.count("gateway start") == 1


def test_when_both_die_another_gateway_is_started(stage, gateway):
    """FAULTS 4, 37."""
    stage.does("spare", "die-after-go")
    gateway.answers["freeze"] = kill(partial(first, stage))

    async def script():
        await until(stage.is_up)
        with refused("exit status 5; the old one has ended too, another is started"):
            await order(stage.folder, "upgrade")
        await until(lambda: len(stage.pids("gateway start")) == 2)
        await until(lambda: stage.listed("gateway") == [stage.pids("gateway start")[1]])

    running(stage.supervisor(connect=gateway), script)


@pytest.mark.parametrize(
    "answer",
    [
        LineError("the gateway broke off", broken=True),
        LineError("refused", broken=False),
        trio.sleep_forever,
    ],
)
def test_an_old_gateway_that_does_not_leave_is_killed(stage, gateway, answer):
    gateway.answers["leave"] = answer

    async def script():
        await until(stage.is_up)
        new = (await order(stage.folder, "upgrade"))["gateway"]
        await until(lambda: started_at_ticks(first(stage)) is None)
        assert stage.listed("gateway") == [new]

    running(stage.supervisor(connect=gateway, timing=replace(QUICK, resume_seconds=0.3)), script)


def test_an_old_gateway_that_leaves_too_slowly_is_killed(stage, gateway):
    leaving: list[int] = []

    def leave() -> dict[str, bool]:
        leaving.extend(stage.listed("leaving"))
        return {"left": False}

    gateway.answers["leave"] = leave

    async def script():
        await until(stage.is_up)
        await order(stage.folder, "upgrade")
        await until(lambda: started_at_ticks(first(stage)) is None)
        assert leaving == [first(stage)]

    running(stage.supervisor(connect=gateway, timing=replace(QUICK, drain_seconds=0.3)), script)


def test_one_order_at_a_time(stage, gateway):
    release = trio.Event()

    async def freeze() -> dict[str, bool]:
        await release.wait()
        return {"frozen": True}

    gateway.answers["freeze"] = freeze

    async def script():
        await until(stage.is_up)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(order, stage.folder, "upgrade")
            await until(lambda: "freeze" in gateway.asked)
            for name in ("upgrade", "reload", "drain"):
                with refused("upgrade is under way, for"):
                    await order(stage.folder, name)
            release.set()

    running(stage.supervisor(connect=gateway), script)
    assert gateway.asked == ["freeze", "leave"]


@pytest.mark.parametrize("where", ["load", "freeze", "go", "leave"])
def test_a_stop_in_an_upgrade_leaves_one_gateway_to_be_drained(stage, gateway, where):
    """FAULTS 71: the old one, resumed, unless the successor was ready already."""
    if where == "load":
        stage.does("spare", "hang")
    elif where == "go":
        stage.does("spare", "hang-after-go")
    else:
        gateway.answers[where] = trio.sleep_forever
    supervisor = stage.supervisor(connect=gateway)
    reached = {
        "load": lambda: stage.pids("spare start"),
        "freeze": lambda: "freeze" in gateway.asked,
        "go": lambda: stage.pids("spare go"),
        "leave": lambda: "leave" in gateway.asked,
    }[where]

    async def script():
        await until(stage.is_up)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupted)
            await until(reached)
            supervisor.request_stop()
        await until(drained)

    async def interrupted():
        with refused("the instance is being stopped"):
            await order(stage.folder, "upgrade")

    def drained() -> object:
        return stage.pids("gateway term") + stage.pids("spare term")

    running(supervisor, script)
    stage.assert_all_ended()
    expected = stage.pids("spare go") if where == "leave" else [first(stage)]
    assert drained() == expected
    assert (
        gateway.asked
        == {
            "load": [],
            "freeze": ["freeze", "resume"],
            "go": ["freeze", "resume"],
            "leave": ["freeze", "leave"],
        }[where]
    )


def test_a_second_stop_in_an_upgrade_does_not_wait_for_the_old_one(stage, gateway):
    """FAULTS 71."""
    stage.does("spare", "hang-after-go")
    gateway.answers["resume"] = trio.sleep_forever
    supervisor = stage.supervisor(
        connect=gateway, timing=replace(QUICK, resume_seconds=600, drain_seconds=600, handover_seconds=600)
    )

    async def script():
        await until(stage.is_up)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupted)
            await until(lambda: stage.pids("spare go"))
            supervisor.request_stop()
            await until(lambda: "resume" in gateway.asked)
            supervisor.request_stop()

    async def interrupted():
        with refused("the instance is being stopped"):
            await order(stage.folder, "upgrade")

    running(supervisor, script)


def test_a_drain_is_the_gateways_and_is_repeated_to_its_successor(stage, gateway):
    async def script():
        await until(stage.is_up)
        assert await order(stage.folder, "drain", seconds=1.5) == {"closed": 0}
        with refused("seconds is a number from 0 to 3600"):
            await order(stage.folder, "drain", seconds=-1)
        os.kill(first(stage), signal.SIGKILL)
        await until(lambda: gateway.asked == ["drain", "drain"])

    running(stage.supervisor(connect=gateway), script)


# The spare


def is_gateway(stage: Stage, pid: int) -> bool:
    return stage.listed("gateway") == [pid]


def has_gone(stage: Stage, pid: int) -> bool:
    return stage.pids("spare go")[-1:] == [pid]


SPARED = replace(QUICK, spare_seconds=0.0)


def test_a_spare_gateway_takes_a_dead_ones_place_and_is_replaced(stage):
    async def script():
        await until(stage.is_up)
        for round_ in range(3):
            await until(lambda: len(stage.listed("spare")) == 1 and stage.listed("gateway"))
            [dead], [spare] = stage.listed("gateway"), stage.listed("spare")
            assert len(stage.pids("spare go")) == round_
            os.kill(dead, signal.SIGKILL)
            await until(partial(is_gateway, stage, spare))
            await until(partial(has_gone, stage, spare))

    running(stage.supervisor(timing=SPARED), script)
    assert stage.journal.count("gateway start") == 1


def test_a_spare_that_dies_is_replaced_and_one_that_fails_at_its_turn_is_passed_over(stage):
    async def script():
        await until(stage.is_up)
        await until(lambda: stage.listed("spare"))
        [spare] = stage.listed("spare")
        stage.does("spare", "die-after-go")
        os.kill(spare, signal.SIGKILL)
        await until(lambda: stage.listed("spare") not in ([], [spare]))
        os.kill(first(stage), signal.SIGKILL)
        await until(lambda: len(stage.pids("gateway start")) == 2)

    running(stage.supervisor(timing=SPARED), script)


def test_a_gateway_that_dies_with_its_spare_is_started_at_once_and_before_the_next_spare(stage):
    """Here the spare's death is news only when it has been told to go."""
    stage.does("spare", "killed-after-go")

    async def script():
        await until(stage.is_up)
        await until(lambda: supervisor._gateways._spare is not None)  # it has loaded, and waits
        os.kill(first(stage), signal.SIGKILL)
        await until(lambda: len(stage.pids("spare start")) == 2 and stage.listed("spare"))

    supervisor = stage.supervisor(timing=SPARED)
    with capture_logs() as lines:
        running(supervisor, script)
    starts = [line for line in stage.journal if line in ("gateway start", "spare start")]
    assert starts == ["gateway start", "spare start"] * 2
    assert [line["in_s"] for line in lines if line["event"].startswith("gateway ended")] == [0.0]


def test_an_upgrade_replaces_the_spare_whose_code_is_old(stage, gateway):
    async def script():
        await until(stage.is_up)
        await until(lambda: stage.listed("spare"))
        [old] = stage.listed("spare")
        answer = await order(stage.folder, "upgrade")
        assert answer["gateway"] != old
        await until(lambda: stage.listed("spare") not in ([], [old]))
        await until(lambda: started_at_ticks(old) is None)

    running(stage.supervisor(timing=SPARED, connect=gateway), script)


def test_the_first_death_of_a_gateway_costs_no_wait(stage):
    slow = replace(QUICK, backoff_first_seconds=600, backoff_limit_seconds=600)

    async def script():
        await until(stage.is_up)
        os.kill(first(stage), signal.SIGKILL)
        await until(lambda: len(stage.pids("gateway start")) == 2)

    running(stage.supervisor(timing=slow), script)


def test_a_stop_in_a_rollback_does_not_leave_the_old_one_frozen(stage, gateway):
    """FAULTS 71: what has begun to be put right is put right."""
    stage.does("spare", "die-after-go")
    release = trio.Event()

    async def resume() -> dict[str, bool]:
        await release.wait()
        resumed.append(True)
        return {"frozen": False}

    resumed: list[bool] = []
    gateway.answers["resume"] = resume
    supervisor = stage.supervisor(connect=gateway)

    async def script():
        await until(stage.is_up)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(interrupted)
            await until(lambda: "resume" in gateway.asked)
            supervisor.request_stop()
            await trio.testing.wait_all_tasks_blocked()
            release.set()
        await until(lambda: stage.pids("gateway term"))

    async def interrupted():
        with refused("could not take over: exit status 5; the old one goes on"):
            await order(stage.folder, "upgrade")

    running(supervisor, script)
    assert resumed == [True]
