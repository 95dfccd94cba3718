"""The processes that are measured: started, weighed, ended.

Owns the start and the end of `broker serve` and of the floors, and what /proc says about them. CPU time is
summed over the tasks of a process, since `/proc/PID/schedstat` alone counts its first thread only.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from hibernation.admin import AdminClient, processes_of

ROOT = Path(__file__).resolve().parents[2]
ROOMS = Path(__file__).with_name("rooms.py")
#: How long a process may take to start, and to end.
START_SECONDS = 30.0
STOP_SECONDS = 60.0


def cpu_us(pid: int) -> float:
    """CPU time that a process has used, in microseconds, all threads together.

    Source: proc(5), /proc/PID/task/TID/schedstat, first field, in nanoseconds.
    """
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1000


@dataclass
class Memory:
    """Memory of some processes, in bytes, as /proc/PID/smaps_rollup gives it."""

    #: Proportional set size: a page shared by n processes counts 1/n in each.
    pss: int = 0
    #: The part of it that belongs to no file, which strangers' processes cannot change.
    anonymous: int = 0

    def __sub__(self, other: "Memory") -> "Memory":
        return Memory(self.pss - other.pss, self.anonymous - other.anonymous)

    def __add__(self, other: "Memory") -> "Memory":
        return Memory(self.pss + other.pss, self.anonymous + other.anonymous)


def memory_of(pid: int) -> Memory:
    """Memory of one process."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    return Memory(found["Pss"], found.get("Pss_Anon", found["Anonymous"]))


@dataclass
class Usage:
    """CPU time of the broker's processes, in microseconds."""

    gateway: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return self.gateway + self.host

    def __sub__(self, other: "Usage") -> "Usage":
        return Usage(self.gateway - other.gateway, self.host - other.host)


class Server:
    """A process that says where it listens with a line `… on http://HOST:PORT`."""

    #: What it complains of is what is measured, and not shown.
    ends_badly = False

    def __init__(self, command: list[str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if not name.startswith("BROKER_")},
        )
        try:
            self.port = self._wait_for_line()
        except BaseException:
            self.stop()
            raise
        self.pid = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def cpu_us(self) -> float:
        return cpu_us(self.pid)

    def _wait_for_line(self) -> int:
        assert self._process.stdout is not None
        deadline = time.monotonic() + START_SECONDS
        text = b""
        while time.monotonic() < deadline:
            if select.select([self._process.stdout], [], [], 0.1)[0]:
                data = os.read(self._process.stdout.fileno(), 4096)
                text += data
                found = re.search(rb"on http://[^\s:]+:(\d+)\n", text)
                if found:
                    return int(found[1])
                if not data:
                    break
        raise RuntimeError(f"the server did not start: {text!r}")

    def stop(self) -> None:
        """End it, and everything that it has started."""
        process = self._process
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # the second one forces
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
        self._log.seek(0)
        for line in self._log:
            if b'"level": "info"' not in line and not self.ends_badly:
                sys.stderr.buffer.write(line)
        self._log.close()


class Broker(Server):
    """`broker serve` with the rooms of the benchmarks, on a data directory of its own."""

    def __init__(
        self, *, durability: str = "os", options: tuple[str, ...] = (), ends_badly: bool = False
    ) -> None:
        self.ends_badly = ends_badly
        self._directory = tempfile.TemporaryDirectory(prefix="broker-benchmark-")
        self.data = Path(self._directory.name)
        try:
            super().__init__(
                [
                    *(sys.executable, "-P", "-m", "broker", "serve", str(ROOMS), "--bind", "127.0.0.1:0"),
                    *("--data", str(self.data), "--durability", durability, *options),
                ]
            )
        except BaseException:
            self._directory.cleanup()
            raise
        with AdminClient(self.data) as client:
            stats = client.ask("stats")
        self.gateways: list[int] = stats["gateways"]
        self.hosts: list[int] = stats["hosts"]
        self.keepers = processes_of(self.data, "keeper")

    def stats(self) -> dict[str, object]:
        """What `broker stats --json` shows."""
        with AdminClient(self.data) as client:
            answer = client.ask("stats")
        assert isinstance(answer, dict)
        return answer

    def usage(self) -> Usage:
        """CPU time used so far."""
        return Usage(sum(map(cpu_us, self.gateways)), sum(map(cpu_us, self.hosts)))

    def memory(self) -> Memory:
        """Memory of all its processes, the supervisor included."""
        return sum(map(memory_of, [self.pid, *self.gateways, *self.hosts, *self.keepers]), Memory())

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self._directory.cleanup()


class Floor(Server):
    """One of the servers in `floors`."""

    def __init__(self, kind: str) -> None:
        super().__init__([sys.executable, "-P", "-m", "tests.benchmarks.floors", kind])


@dataclass
class Stopwatch:
    """Wall time, and CPU time of this process: of the client, that is."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _began: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    @property
    def busy(self) -> str:
        """How much of a core this process has used: near 100 %, it was the bottleneck."""
        return f"{self.cpu_seconds / self.seconds:.0%}"


@contextlib.contextmanager
def stopwatch() -> Iterator[Stopwatch]:
    """Measure the body."""
    watch = Stopwatch()
    began, cpu_began = time.perf_counter(), time.process_time()
    try:
        yield watch
    finally:
        watch.seconds = time.perf_counter() - began
        watch.cpu_seconds = time.process_time() - cpu_began
