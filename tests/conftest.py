"""What every test starts from: none of the broker's settings in the environment, and a quiet Hypothesis."""

import os

from hypothesis import HealthCheck, settings

# Whoever runs the tests may have BROKER_* variables set; neither the tests nor what they start must see them.
for name in [name for name in os.environ if name.startswith("BROKER_")]:
    del os.environ[name]

# Deterministic, no time limit per example: a slow machine must not turn a property into a coin toss.
settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("project")
