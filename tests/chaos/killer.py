"""Kills the processes of an instance at random moments, and counts.

Owns the order and the times of the misfortunes, and the lines of `killer.jsonl`. A moment is random in every
respect: which process, how long after the last one, during whatever the broker is doing; a part of the kills
comes within 0.3 s of the one before, which is during its recovery, and some hit two at once. A process that
is not there when its turn comes dies as soon as it is. Of several kinds, those that were killed less often
come more often, so that all get to the same number. Everything comes from one seed. Gateway and keeper are
never killed together, nor one before the other holds again what both should: a socket that both have lost is
lost, and nobody promises otherwise. A supervisor that was killed is started again at once by `broker serve`;
the rest is the broker's own business. Peers: `instance`, `history`.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.history import KILLER, Log
from tests.chaos.instance import Instance, alive

__all__ = ["Killer", "Plan"]


@dataclass
class Plan:
    """What is killed, and how often."""

    kinds: Sequence[str] = ("host",)
    gap_seconds: float = 1.0
    """Between two kills, on average."""
    least_gap_seconds: float = 0.0
    pairs: float = 0.1
    """Which part of the kills hits two processes at once."""
    during_recovery: float = 0.25
    """Which part comes within 0.3 s of the one before."""
    both: bool = False
    """Whether gateway and keeper may die together, which costs sockets."""
    wait: bool = False
    """Whether each kill waits until the instance answers again."""
    commands: Sequence[str] = ()
    """Commands that run now and then in between: reload, upgrade."""
    command_gap_seconds: float = 8.0
    seed: int = 1
    kills: int = 0
    """End when each kind has been killed so often; 0: when the time is over."""
    seconds: float = 60.0
    counts: Counter[str] = field(default_factory=Counter)
    """What was done: by kind of process, or by command."""
    failures: list[str] = field(default_factory=list)
    """Commands and starts that failed, in words. A command may fail when its processes are killed."""


class Killer:
    """See the module."""

    def __init__(self, instance: Instance, plan: Plan) -> None:
        self._instance = instance
        self._plan = plan
        self._chance = random.Random(plan.seed)
        self._commands: list[tuple[str, subprocess.Popen[bytes]]] = []
        self._starting = False
        self._starts_failed = 0
        #: The kinds to kill once there is such a process again.
        self._owed: set[str] = set()
        #: The kinds of those killed since gateway and keeper were last seen to hold the same sockets.
        self._exposed: set[str] = set()

    def run(self, watch: Callable[[], bool] = lambda: True) -> None:
        """Kill until the time is over, or all kinds have been killed often enough, or `watch` says no more.

        On return nothing is being killed any more, and the supervisor runs; the rest may be recovering.
        """
        plan, chance = self._plan, self._chance
        with Log(Path(self._instance.folder) / KILLER) as log:
            end = time.monotonic() + plan.seconds
            next_kill = time.monotonic() + chance.uniform(0, plan.gap_seconds)
            next_command = time.monotonic() + chance.uniform(0, plan.command_gap_seconds)
            while time.monotonic() < end and watch():
                self._see_to_supervisor(log)
                self._reap_commands(log)
                now = time.monotonic()
                if plan.kinds and now >= next_kill:
                    kinds = self._still_wanted()
                    if not kinds:
                        break
                    self._kill(kinds, log)
                    next_kill = time.monotonic() + self._gap()
                for kind in list(self._owed):
                    if not self._spared(kind):
                        self._kill_one(kind, log)
                if plan.commands and now >= next_command:
                    name = chance.choice(plan.commands)
                    self._commands.append((name, self._instance.command(name)))
                    log.add("killer", "", "", 0, name)
                    next_command = now + chance.uniform(0, 2 * plan.command_gap_seconds)
                log.flush()
                time.sleep(min(0.01, max(0.0005, next_kill - time.monotonic())))
            deadline = time.monotonic() + 60
            while (self._commands or self._starting) and time.monotonic() < deadline:
                self._see_to_supervisor(log)
                self._reap_commands(log)
                time.sleep(0.05)
            for _, process in self._commands:
                process.kill()
                process.communicate()

    def _still_wanted(self) -> list[str]:
        plan = self._plan
        return [kind for kind in plan.kinds if not plan.kills or plan.counts[kind] < plan.kills]

    def _gap(self) -> float:
        plan, chance = self._plan, self._chance
        if chance.random() < plan.during_recovery:
            return max(plan.least_gap_seconds, chance.uniform(0, 0.3))
        # So that the average is what was asked for, whatever comes early.
        return max(
            plan.least_gap_seconds, chance.uniform(0, 2 * plan.gap_seconds / (1 - plan.during_recovery))
        )

    def _kill(self, kinds: Sequence[str], log: Log) -> None:
        chance = self._chance
        if self._plan.wait:
            self._wait(log)
        counts = [self._plan.counts[kind] for kind in kinds]
        victims = chance.choices(kinds, [1 + max(counts) - count for count in counts])
        if len(kinds) > 1 and chance.random() < self._plan.pairs:
            victims = chance.sample(list(kinds), 2)
        for kind in victims:
            if self._spared(kind):
                others = [other for other in kinds if other not in ("gateway", "keeper", *victims)]
                if not others:
                    continue
                kind = chance.choice(others)
            self._kill_one(kind, log)

    def _kill_one(self, kind: str, log: Log) -> None:
        pids = [pid for pid in self._instance.pids(kind) if alive(pid)]
        if not pids:
            self._owed.add(kind)
            return
        self._owed.discard(kind)
        pid = self._chance.choice(pids)
        with contextlib.suppress(ProcessLookupError):
            log.add("killer", "", "", pid, f"kill {kind}")
            os.kill(pid, signal.SIGKILL)
            self._plan.counts[kind] += 1

    def _spared(self, kind: str) -> bool:
        """Whether the death of one of this kind would now cost sockets."""
        other = {"gateway": "keeper", "keeper": "gateway"}.get(kind)
        if other is None or self._plan.both:
            return False
        if other in self._exposed:
            if not self._instance.covered():
                return True
            self._exposed.clear()
        self._exposed.add(kind)
        return False

    def _wait(self, log: Log) -> None:
        deadline = time.monotonic() + 30
        while not self._instance.answers() and time.monotonic() < deadline:
            self._see_to_supervisor(log)
            time.sleep(0.02)

    def _see_to_supervisor(self, log: Log) -> None:
        if "supervisor" not in self._plan.kinds:
            return
        instance = self._instance
        if instance.supervised:
            if self._starting and instance.ready:
                self._starting = False
                self._starts_failed = 0
                log.add("killer", "", "", 0, "supervisor ready")
            return
        if self._starting and not instance.was_killed:
            self._starts_failed += 1
        if self._starts_failed > 20:
            raise RuntimeError(f"`broker serve` does not take over:\n{instance.tail()}")
        instance.spawn()
        self._starting = True
        log.add("killer", "", "", 0, "serve")
        if self._starts_failed:
            time.sleep(0.1 * self._starts_failed)

    def _reap_commands(self, log: Log) -> None:
        for name, process in list(self._commands):
            if process.poll() is None:
                continue
            self._commands.remove((name, process))
            output, _ = process.communicate()
            said = output.decode(errors="replace").strip()[-300:]
            log.add("killer", "", "", process.returncode, f"{name} ended", json.loads(json.dumps(said)))
            if process.returncode:
                self._plan.failures.append(f"{name}: {said}")
                self._plan.counts[f"{name} failed"] += 1
            else:
                self._plan.counts[name] += 1
