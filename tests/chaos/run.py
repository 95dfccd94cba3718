"""`python -m tests.chaos run`: clients, kills, and what the checker says.

Owns the order of a run: start, drive, kill, let it come to rest, read the history, prove the checker on it,
report. Peers: `instance`, `clients`, `killer`, `checker`, `planting`.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.checker import BLAME_SECONDS, KINDS, Report, Silence, check
from tests.chaos.clients import Options
from tests.chaos.history import CLIENTS, Event, read
from tests.chaos.instance import KINDS as PROCESSES
from tests.chaos.instance import ROOT, Instance
from tests.chaos.killer import Killer, Plan
from tests.chaos.planting import prove_checker

__all__ = ["Outcome", "chaos", "main", "summary"]

#: Commands of the broker that may run in between.
COMMANDS = ("reload", "upgrade")
#: How long the clients may need to finish: their own deadline, and then some.
FINISH_SECONDS = 150.0
#: How long the killer waits for half of the clients to be there.
HALF_THERE_SECONDS = 60.0


@dataclass
class Outcome:
    """What came of a run."""

    report: Report
    plan: Plan
    unproved: list[str]
    """Planted faults that the checker missed."""
    silences: dict[str, Silence]
    """The longest silence by what was killed shortly before or during it."""
    client_cpu: float
    """Part of a core that the clients used."""
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong, the checker included."""
        return not self.report.findings and not self.unproved


def chaos(folder: Path, options: Options, plan: Plan, *arguments: str) -> Outcome:
    """Run clients against an instance whose processes are killed; judge what happened.

    `arguments` are further ones of `broker serve`. `options.port` and `.folder` are filled in here.
    """
    with Instance(folder, *arguments) as instance:
        options.port, options.folder = instance.port, str(folder)
        began = time.monotonic()
        clients = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.clients", options.to_json()], stdin=subprocess.PIPE, cwd=ROOT
        )
        try:
            deadline = time.monotonic() + HALF_THERE_SECONDS
            while _opened(folder) < options.connections // 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            Killer(instance, plan).run(lambda: clients.poll() is None)
            assert clients.stdin is not None
            clients.stdin.close()
            clients.wait(FINISH_SECONDS)
        finally:
            clients.kill()
            clients.wait()
    events = read(folder)
    return judge(events, plan, time.monotonic() - began)


def _opened(folder: Path) -> int:
    """How many connections have been opened so far."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / CLIENTS).read_bytes().count(b'"open"')
    return 0


def judge(events: list[Event], plan: Plan, seconds: float) -> Outcome:
    """Check a history, and the checker on it."""
    report = check(events)
    cpu = max(
        (event.detail["cpu_seconds"] for event in events if event.event.endswith("finish")), default=0.0
    )
    unproved = prove_checker(events, plan.seed)
    return Outcome(report, plan, unproved, longest_silences(report, events), cpu / max(seconds, 1), seconds)


def longest_silences(report: Report, events: Sequence[Event]) -> dict[str, Silence]:
    """The longest silence in all, without a misfortune near it, and by which alone was near it."""
    causes = [
        event._replace(event=event.event.removeprefix("kill "))
        for event in events
        if event.who == "killer" and (event.event.startswith("kill ") or event.event in COMMANDS)
    ]
    longest: dict[str, Silence] = {}
    for silence in report.silences:
        since, until = silence.began - BLAME_SECONDS, silence.began + silence.seconds
        near = {cause.event for cause in causes if since <= cause.time <= until}
        name = near.pop() if len(near) == 1 else "several" if near else "nothing"
        for each in (name, "in all"):
            longest[each] = max(longest.get(each, Silence()), silence)
    if report.handshakes:
        longest["handshake"] = max(report.handshakes)
    return longest


def summary(outcome: Outcome, examples: int = 5) -> str:
    """What is printed at the end."""
    report, plan = outcome.report, outcome.plan
    found = Counter(finding.kind for finding in report.findings)
    lines = [
        f"seed {plan.seed}, {outcome.seconds:.0f} s, clients used {outcome.client_cpu:.0%} of a core",
        "",
    ]
    kills = ", ".join(f"{name} {count}" for name, count in sorted(plan.counts.items()))
    lines.append(f"{'kills and commands':24}{kills or 'none'}")
    for name in (
        *("connections", "handshakes refused", "messages", "answers", "broadcasts", "deliveries"),
        *("closes", "attempts", "turns run again"),
    ):
        lines += [f"{name:24}{report.counts[name]:,}"]
    lines.append("")
    lines += [f"{kind:24}{found[kind]:,}" for kind in KINDS]
    lines.append("")
    for name, silence in sorted(outcome.silences.items()):
        lines.append(f"longest silence, {name:12}{silence.seconds:8.3f} s  {silence.connection}")
    lines.append("")
    if outcome.unproved:
        lines += ["THE CHECKER IS NOT PROVED ON THIS RUN", *outcome.unproved, ""]
    else:
        lines += ["the checker found a planted fault of each kind in a copy of this run's history", ""]
    for kind in KINDS:
        of_kind = report.of(kind)
        lines += [str(finding) for finding in of_kind[:examples]]
        if len(of_kind) > examples:
            lines.append(f"… and {len(of_kind) - examples} more: {kind}")
    for failure in plan.failures[:examples]:
        lines.append(f"failed command: {failure}")
    lines.append("CLEAN" if outcome.clean else "NOT CLEAN")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 1 when anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--kills", type=int, default=0, help="end when each kind was killed so often")
    parser.add_argument("--connections", type=int, default=2000)
    parser.add_argument("--rooms", type=int, default=200)
    parser.add_argument("--rate", type=float, default=600, help="messages a second, of all clients")
    parser.add_argument("--churn", type=float, default=20, help="connections a second that leave")
    parser.add_argument("--large", type=float, default=0.005, help="part of the messages that is large")
    parser.add_argument("--kill", default="host", help="comma-separated: gateway, host, keeper, supervisor")
    parser.add_argument("--gap", type=float, default=1.0, help="seconds between kills, on average")
    parser.add_argument("--least-gap", type=float, default=0.0)
    parser.add_argument("--pairs", type=float, default=0.1, help="part of the kills that hits two at once")
    parser.add_argument("--during-recovery", type=float, default=0.25)
    parser.add_argument("--both", action="store_true", help="let gateway and keeper die together")
    parser.add_argument("--wait", action="store_true", help="wait for recovery before each kill")
    parser.add_argument("--commands", default="", help="comma-separated, run in between: reload, upgrade")
    parser.add_argument("--command-gap", type=float, default=8.0)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--durability", default="full")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, help="keep history and log in this folder")
    given = parser.parse_args(arguments)
    seed = given.seed if given.seed is not None else time.time_ns() % 1_000_000
    print(f"seed {seed}", flush=True)
    kinds = [kind for kind in given.kill.split(",") if kind]
    if unknown := set(kinds) - set(PROCESSES):
        parser.error(f"no such process: {', '.join(sorted(unknown))}")
    plan = Plan(
        kinds=kinds,
        gap_seconds=given.gap,
        least_gap_seconds=given.least_gap,
        pairs=given.pairs,
        during_recovery=given.during_recovery,
        both=given.both,
        wait=given.wait,
        commands=[name for name in given.commands.split(",") if name],
        command_gap_seconds=given.command_gap,
        seed=seed,
        kills=given.kills,
        seconds=given.seconds,
    )
    options = Options(
        port=0,
        folder="",
        connections=given.connections,
        rooms=given.rooms,
        rate=given.rate,
        churn=given.churn,
        large=given.large,
        seed=seed,
    )
    with tempfile.TemporaryDirectory(prefix="broker-chaos-") as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        serve = ("--hosts", str(given.hosts), "--durability", given.durability)
        outcome = chaos(folder, options, plan, *serve)
        print(summary(outcome))
        if given.keep:
            facts = {"counts": plan.counts, "found": Counter(each.kind for each in outcome.report.findings)}
            (folder / "outcome.json").write_text(json.dumps(facts, indent=2))
    return 0 if outcome.clean else 1
