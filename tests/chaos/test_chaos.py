"""A sample of the chaos runs: clients notice no death of any process, but for some silence (S22, S34)."""

import pytest

from tests.chaos.clients import Options
from tests.chaos.killer import Plan
from tests.chaos.run import chaos, summary

pytestmark = pytest.mark.e2e


def options(seed: int) -> Options:
    return Options(port=0, folder="", connections=60, rooms=6, rate=300, churn=4, seed=seed)


@pytest.mark.parametrize(
    ("kinds", "kills"),
    [(("host",), 8), (("gateway",), 8), (("keeper", "supervisor"), 4), (("gateway", "host", "keeper"), 6)],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_nobody_notices_a_kill(tmp_path, kinds, kills):
    plan = Plan(kinds=kinds, kills=kills, gap_seconds=0.8, seconds=45, seed=7)
    outcome = chaos(tmp_path, options(7), plan, "--hosts", "2")
    assert outcome.clean, summary(outcome)
    assert all(plan.counts[kind] >= 3 for kind in kinds), plan.counts
    assert outcome.report.counts["answers"] > 500
