"""What every test starts from: none of the broker's settings in the environment, and a quiet Hypothesis."""

import os

import pytest
from hypothesis import HealthCheck, settings

# Deterministic, no time limit per example: a slow machine must not turn a property into a coin toss.
settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")


@pytest.fixture(autouse=True)
def no_settings_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs the tests may have BROKER_* variables set; the tests must not see them."""
    for name in list(os.environ):
        if name.startswith("BROKER_"):
            monkeypatch.delenv(name)
