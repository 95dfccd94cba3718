"""Each scenario in the kit, and against the real command: both see the same (S43)."""

from functools import cache

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
