"""`python -m tests.chaos sweep`: kill each process at each of its interesting system calls.

Owns the points, the attachment of strace to a running process, and the scenario in which it dies. A point is
(process, call, N): the process is killed by SIGKILL on entering its N-th such call, counted from the
beginning of a small scenario of 3 clients in 2 rooms. For each call N goes up from 1 until a scenario comes
to its end without a kill. After each scenario the checker judges its history, and so it has to be proved on
some of them. strace counts calls for each thread on its own.

A fresh instance serves a number of points: only the process that was killed is a new one each time.
Peers: `instance`, `clients`, `checker`.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.checker import Report, check
from tests.chaos.clients import Clients, Options
from tests.chaos.history import CLIENTS, KILLER, ROOMS, Event, Log, read
from tests.chaos.instance import Instance, alive
from tests.chaos.planting import prove_checker
from tests.tracing import injected

__all__ = ["CALLS", "Point", "Result", "Sweep", "main"]

#: What is worth dying at: every call that leaves a trace outside of the process.
CALLS: dict[str, tuple[str, ...]] = {
    "host": ("pwrite64", "fdatasync", "sendto", "sendmsg", "write", "recvfrom"),
    "gateway": ("sendto", "recvfrom", "sendmsg", "pwrite64", "fdatasync", "epoll_ctl", "accept4", "recvmsg"),
    "keeper": ("recvmsg", "sendmsg", "close"),
}
#: The instance is replaced after so many points, so that the supervisor's pauses stay short.
POINTS_PER_INSTANCE = 5
#: A process that is not there after so long is none that this broker has.
START_SECONDS = 60.0


@dataclass(frozen=True)
class Point:
    """Where a process is killed."""

    process: str
    call: str
    number: int

    def __str__(self) -> str:
        return f"{self.process} {self.call} {self.number}"


@dataclass
class Result:
    """What came of one point."""

    point: Point
    killed: bool
    """False: the scenario ended before there were so many calls."""
    report: Report
    events: list[Event]

    @property
    def clean(self) -> bool:
        """Whether the checker found nothing."""
        return not self.report.findings


class Sweep:
    """Runs points one after the other; a context manager."""

    def __init__(self, folder: Path, *, seed: int = 1, messages: int = 40) -> None:
        self._folder = folder
        self._seed = seed
        self._messages = messages
        self._instance: Instance | None = None
        self._points = 0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Sweep":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, point: Point) -> Result | None:
        """Run the scenario with this death in it; None when there is no such process."""
        instance = self._serving()
        pid = self._pid(point.process)
        if pid is None:
            return None
        self._points += 1
        for name in (CLIENTS, KILLER):
            (instance.folder / name).unlink(missing_ok=True)
        # The rooms have it open to append to: emptied, it begins anew.
        os.truncate(instance.folder / ROOMS, 0)
        options = Options(
            port=instance.port,
            folder=str(instance.folder),
            connections=3,
            rooms=2,
            rate=400,
            churn=6,
            large=0.04,
            messages=self._messages,
            seed=self._seed,
            prefix=f"p{self._points}-",
            finish_seconds=40,
        )
        with injected([pid], point.call, f"signal=KILL:when={point.number}"):
            Clients(options).run()
            killed = not alive(pid)
        if killed:
            with Log(instance.folder / KILLER) as log:
                log.add("killer", "", "", pid, f"kill {point.process}")
        events = read(instance.folder)
        result = Result(point, killed, check(events), events)
        if not result.clean:
            # What it has broken is not the next point's.
            self._replace()
        return result

    def until_the_end(self, process: str, call: str, *, step: int = 1, limit: int = 400) -> Iterator[Result]:
        """The points of one call, until the scenario outlives it; the last result is not a kill."""
        for number in range(1, limit, step):
            result = self.run(Point(process, call, number))
            if result is None:
                return
            yield result
            if not result.killed:
                return

    def _pid(self, process: str) -> int | None:
        """The process id; one that the point before has killed is waited for."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self._instance is not None
            pids = [pid for pid in self._instance.pids(process) if alive(pid)]
            if pids:
                return pids[0]
            time.sleep(0.02)
        return None

    def _serving(self) -> Instance:
        if self._instance is None or self._points % POINTS_PER_INSTANCE == 0:
            self._replace()
            folder = self._folder / f"instance-{time.monotonic_ns()}"
            folder.mkdir()
            self._instance = self._stack.enter_context(Instance(folder))
        self._instance.wait_until_ready()
        return self._instance

    def _replace(self) -> None:
        self._stack.close()
        if self._instance is not None:
            shutil.rmtree(self._instance.folder, ignore_errors=True)
        self._instance = None


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 1 when anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos sweep", description=__doc__)
    parser.add_argument("--process", default="gateway,host,keeper")
    parser.add_argument("--calls", default="", help="comma-separated; all interesting ones of each process")
    parser.add_argument("--step", type=int, default=1, help="try only each so-many-th call")
    parser.add_argument("--limit", type=int, default=400, help="points of one call at most")
    parser.add_argument("--messages", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    found: Counter[str] = Counter()
    points = kills = 0
    history: list[Event] = []
    with tempfile.TemporaryDirectory(prefix="broker-sweep-") as folder:
        with Sweep(Path(folder), seed=given.seed, messages=given.messages) as sweep:
            for process in given.process.split(","):
                for call in given.calls.split(",") if given.calls else CALLS[process]:
                    reached = 0
                    for result in sweep.until_the_end(process, call, step=given.step, limit=given.limit):
                        points += 1
                        kills += result.killed
                        reached = max(reached, result.point.number) if result.killed else reached
                        history += result.events
                        for finding in result.report.findings:
                            found[finding.kind] += 1
                            print(f"{result.point}: {finding}", flush=True)
                    print(f"{process} {call}: killed at 1..{reached}", flush=True)
    unproved = prove_checker(history, given.seed)
    print(f"\n{points} points, {kills} kills, seed {given.seed}")
    for kind, count in sorted(found.items()):
        print(f"{kind:24}{count}")
    for text in unproved:
        print(text)
    clean = not found and not unproved
    print("CLEAN" if clean else "NOT CLEAN")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
