"""The child processes of a supervisor: how they are started, heard and ended.

Owns each child from the system call that makes it to the one that reaps it: none is ever lost, whatever is
cancelled. Decides nothing about which child should run: that is `hibernation.supervisor`. Its peers on the
other side of the pipes are `broker.gateway.__main__` and `broker.host`.
"""

import json
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import trio

from hibernation.configuration import GatewayConfig, HostConfig
from hibernation.logs import get_logger
from hibernation.settings import Settings

__all__ = ["Backoff", "Child", "Children", "Commands", "LoadError", "Timing"]

log = get_logger("supervisor")

STATUS_LINE_BYTES_MAX = 1024 * 1024
"""A child that writes more than this without a newline is not one of ours."""


@dataclass(frozen=True, slots=True)
class Commands:
    """The command lines of the children. `-P`: the folder we were started in is not searched for modules,
    so that a `storage/` of the user's own there does not stand in for ours.
    """

    gateway: Sequence[str] = (sys.executable, "-P", "-m", "broker.gateway")
    host: Sequence[str] = (sys.executable, "-P", "-m", "broker.host")


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of the supervisor, in seconds."""

    load_seconds: float = 30.0
    """For a host to import the app and say so. The first gateway, ready when its hosts are, gets twice
    that; a later one as long as it takes, since sockets wait at it."""
    drain_seconds: float = 40.0
    """For a gateway to close its sockets and see their close turns through, before it is killed."""
    finish_seconds: float = 35.0
    """For a host to finish its running turns, before it is killed."""
    backoff_first_seconds: float = 0.1
    backoff_limit_seconds: float = 10.0
    backoff_reset_seconds: float = 10.0
    """After a life of this length the waiting begins at its shortest again."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Give the deadlines that leave the children the `drain` they are promised, and a little."""
        return cls(drain_seconds=settings.drain + 10, finish_seconds=settings.drain + 5)


class Backoff:
    """How long to wait before a child that died is started again: 0.1 s doubling to 10 s. Pure."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._next_seconds = timing.backoff_first_seconds

    def delay(self, alive_seconds: float) -> float:
        """Give the seconds to wait after a child that lived for `alive_seconds`."""
        if alive_seconds >= self._timing.backoff_reset_seconds:
            self._next_seconds = self._timing.backoff_first_seconds
        seconds = self._next_seconds
        self._next_seconds = min(seconds * 2, self._timing.backoff_limit_seconds)
        return seconds


MakeConfig = Callable[[int], GatewayConfig | HostConfig]
"""Makes a child's configuration when the number of its status pipe is known."""


class LoadError(Exception):
    """A child did not come up; the text says why."""

    def __init__(self, text: str, *, by_app: bool) -> None:
        super().__init__(text)
        self.text = text
        self.by_app = by_app
        """The host said so itself: nothing is wrong with the machine."""


class Child:
    """One running gateway or host: its process, its last word, its end.

    `settled` is set by its first report, or by its exit if it made none. `exited` is set when the process
    has been reaped and its reports have been read to the end.
    """

    def __init__(self, name: str, process: trio.Process, status_fd: int) -> None:
        self.name = name
        self.pid = process.pid
        self.settled = trio.Event()
        self.exited = trio.Event()
        self.reports: dict[str, dict[str, Any]] = {}
        """The last report of each kind."""
        self.started_at = trio.current_time()
        self._process = process
        self._status = trio.lowlevel.FdStream(status_fd)

    def __repr__(self) -> str:
        return f"<{self.name}, pid {self.pid}, {self.outcome if self.exited.is_set() else 'running'}>"

    @property
    def outcome(self) -> str:
        """How the process ended, in words."""
        code = self._process.returncode
        if code is None:
            return "still running"
        if code < 0:
            try:
                return f"killed by {signal.Signals(-code).name}"
            except ValueError:
                return f"killed by signal {-code}"
        return f"exit status {code}"

    @property
    def error(self) -> str | None:
        """The text of its last `error` report."""
        given = self.reports.get("error")
        return None if given is None else str(given.get("text", "no reason given"))

    async def attend(self) -> None:
        """Read its reports and await its exit; runs for as long as the process does."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_reports)
            await self._process.wait()
            # What it said last is in the pipe by now. A grandchild may hold the other end open for ever.
            nursery.cancel_scope.deadline = trio.current_time() + 1
        await self._close_pipes()
        self.exited.set()
        self.settled.set()

    async def _read_reports(self) -> None:
        pending = b""
        while chunk := await self._status.receive_some():
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._take_report(line)
            if len(pending) > STATUS_LINE_BYTES_MAX:
                log.error("status line too long, no more is read", child=self.name, pid=self.pid)
                return

    def _take_report(self, line: bytes) -> None:
        try:
            given = json.loads(line)
            event = given["event"]
        except (ValueError, TypeError, KeyError):
            log.error("unreadable status line", child=self.name, pid=self.pid, line=line[:200])
            return
        self.reports[str(event)] = given
        self.settled.set()

    async def say(self, line: bytes, *, last: bool) -> None:
        """Write to its standard input; that it has died meanwhile shows elsewhere."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            await stdin.send_all(line)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        if last:
            await stdin.aclose()

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self._process.returncode is None:
            self._process.send_signal(number)

    async def stop(self, grace_seconds: float) -> None:
        """Ask it to stop, and kill it when it has not within `grace_seconds`; returns when it has exited.

        Cancellation: the process has been asked, and may still run.
        """
        self.signal(signal.SIGTERM)
        with trio.move_on_after(grace_seconds):
            await self.exited.wait()
        if not self.exited.is_set():
            log.warning(
                "killed: it did not stop in time", child=self.name, pid=self.pid, after_s=grace_seconds
            )
            self.signal(signal.SIGKILL)
            await self.exited.wait()

    async def _close_pipes(self) -> None:
        with trio.CancelScope(shield=True):
            await self._status.aclose()
            if self._process.stdin is not None:
                await self._process.stdin.aclose()


class Children:
    """All processes that one supervisor has started and not yet reaped."""

    def __init__(self, nursery: trio.Nursery, changed: Callable[[list[tuple[str, int]]], None]) -> None:
        """`nursery` must outlive the processes; `changed` gets names and ids on each start and exit."""
        self._nursery = nursery
        self._changed = changed
        self._running: list[Child] = []

    async def start(
        self, name: str, command: Sequence[str], config: MakeConfig, wanted: str, *, within_seconds: float
    ) -> Child:
        """Start a child, give it its configuration and wait for its first report, which must be `wanted`.

        Raises `LoadError` when it is another, or does not come in time, or the system refuses a process.
        Then, and when cancelled, the child has been killed.
        """
        child, line = await self._spawn(name, command, config)
        try:
            with trio.move_on_after(within_seconds):
                await child.say(line, last=wanted == "ready")
                await child.settled.wait()
            if child.error is not None:
                raise LoadError(child.error, by_app=wanted == "loaded")
            if child.exited.is_set():
                raise LoadError(f"the {name} ended while it was starting: {child.outcome}", by_app=False)
            if wanted not in child.reports:
                text = f"the {name} did not start within {within_seconds:g} s"
                raise LoadError(text, by_app=wanted == "loaded")
        except BaseException:
            with trio.CancelScope(shield=True):
                child.signal(signal.SIGKILL)
                await child.exited.wait()
            raise
        return child

    async def _spawn(self, name: str, command: Sequence[str], config: MakeConfig) -> tuple[Child, bytes]:
        """Start a process, and give it with the line that it waits for."""
        reading, writing = -1, -1
        try:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            made = config(writing)
            kept = (writing, made.listener_fd) if isinstance(made, GatewayConfig) else (writing,)
            # Not to be interrupted: a process that nobody knows of could not be stopped.
            with trio.CancelScope(shield=True):
                process = await trio.lowlevel.open_process(
                    list(command),
                    stdin=subprocess.PIPE,
                    close_fds=True,
                    pass_fds=kept,
                    start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor alone
                    umask=0o077,
                    env=_environment(),
                )
        except (OSError, subprocess.SubprocessError) as error:
            _close(reading)
            raise LoadError(f"the {name} cannot be started: {error}", by_app=False) from error
        finally:
            _close(writing)
        child = Child(name, process, reading)
        self._running.append(child)
        self._nursery.start_soon(self._attend, child)
        self._tell()
        return child, made.to_json().encode() + b"\n"

    async def _attend(self, child: Child) -> None:
        # Shielded: the end of `run` waits for the children's exit, which this is.
        with trio.CancelScope(shield=True):
            await child.attend()
        self._running.remove(child)
        self._tell()

    def _tell(self) -> None:
        self._changed([(child.name, child.pid) for child in self._running])

    async def stop(self, kind: str, grace_seconds: float) -> None:
        """Stop all whose name begins with `kind`, at once, as `Child.stop` does."""
        async with trio.open_nursery() as nursery:
            for child in self._running:
                if child.name.startswith(kind):
                    nursery.start_soon(child.stop, grace_seconds)

    async def kill(self) -> None:
        """Kill all that still run; returns when they have exited."""
        for child in self._running:
            child.signal(signal.SIGKILL)
        for child in list(self._running):
            await child.exited.wait()


def _close(fd: int) -> None:
    if fd >= 0:
        os.close(fd)


def _environment() -> dict[str, str] | None:
    """Give the children's environment: ours, and the way to our packages when they are not installed.

    A checkout is on our own path only because we were started in it, which `-P` rules out for children.
    """
    root = str(Path(__file__).resolve().parent.parent)
    if root in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        return None
    known = os.environ.get("PYTHONPATH", "")
    if root in known.split(os.pathsep):
        return None
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, known)))}
