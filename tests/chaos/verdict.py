"""`python -m tests.chaos verdict FOLDER`: look at a kept history once more."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.history import read
from tests.chaos.killer import Plan
from tests.chaos.run import judge, summary

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 1 when anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos verdict", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--examples", type=int, default=20)
    given = parser.parse_args(arguments)
    events = read(given.folder)
    plan = Plan()
    for event in events:
        if event.who == "killer":
            plan.counts[event.event] += 1
    outcome = judge(events, plan, events[-1].time - events[0].time if events else 0)
    print(summary(outcome, given.examples))
    return 0 if outcome.clean else 1
