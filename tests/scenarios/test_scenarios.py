"""Each scenario in the kit, and against the real command: both see the same (S43)."""

from functools import cache
from random import Random
from zlib import crc32

import pytest

from broker.testing import Kit
from tests.e2e.broker_process import BrokerProcess
from tests.e2e.conftest import BrokerFactory, module_broker  # noqa: F401 - a fixture
from tests.scenarios import modules, parties
from tests.scenarios.driver import scenarios_of
from tests.scenarios.in_kit import KitStage
from tests.scenarios.in_process import APP, ProcessStage

ALL = {
    f"{module.__name__.rpartition('.')[2]}-{name}": scenario
    for module in modules()
    for name, scenario in scenarios_of(module).items()
}

#: Scenarios that show what a death does not leave as it was: fields of a room's object, HTTP requests,
#: background work; and what may be done twice: what a turn has flushed or fetched.
DEATHS_SHOW = {
    "background-a_room_has_so_many_pieces_of_background_work",
    "background-an_answer_is_streamed_while_the_chat_goes_on",
    "background-background_work_that_fails_loses_what_it_has_not_flushed",
    "background-what_was_flushed_is_done",
    "deaths-a_room_goes_on_after_the_death_of_its_host",
    "deaths-messages_that_came_while_nobody_was_there_are_not_lost",
    "deaths-new_code_waits_for_turns_and_closes_no_socket",
    "deaths-sockets_go_on_after_the_death_of_their_gateway",
    "life-fields_stay_until_the_room_goes_and_storage_stays_for_ever",
    "life-a_room_starts_once_for_all_who_come_meanwhile",
    "neighbours-two_rooms_have_two_turns",
    "overlap-a_request_is_answered_while_a_message_waits",
}

every_scenario = pytest.mark.parametrize("name", ALL)


@cache
def play_in_kit(name: str) -> dict[str, list[str]]:
    with Kit(*parties()) as kit:
        stage = KitStage(name, kit)
        ALL[name](stage)
        return stage.finish()


@pytest.fixture(scope="module")
def real(module_broker: BrokerFactory) -> BrokerProcess:  # noqa: F811
    return module_broker(APP)


@every_scenario
def test_in_the_kit(name):
    play_in_kit(name)


@pytest.mark.parametrize("name", [name for name in ALL if name not in DEATHS_SHOW and name[:5] != "http-"])
def test_deaths_at_any_point_change_nothing(name):  # S22, S34
    seed = crc32(name.encode())
    unharmed = play_in_kit(name)  # before: one kit runs at a time
    with Kit(*parties(), evict_between_turns=True, seed=seed) as kit:
        stage = KitStage(name, kit, Random(seed))
        ALL[name](stage)
        assert stage.finish() == unharmed
        kit.cancel_orders()


@pytest.mark.e2e
@every_scenario
def test_the_real_command_sees_the_same(name, real):
    stage = ProcessStage(name, real)
    with stage:
        ALL[name](stage)
        seen = stage.finish()
    assert seen == play_in_kit(name)


def test_there_are_enough():
    assert len(ALL) >= 25
