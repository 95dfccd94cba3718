"""One process of an instance, as its supervisor sees it: how it is told things, heard, and ended.

Owns a child's pipes and what it has said, and the pidfd of a process that a former supervisor has left.
Decides nothing about which process should run. Peers: `hibernation.children`, which starts them, and on the
other side of the pipes `broker.gateway.__main__`, `broker.host` and `hibernation.keeper`.
"""

import json
import os
import select
import signal
from typing import Any

import trio

from hibernation.logs import get_logger
from hibernation.waiting import named

__all__ = ["Child", "Running", "Survivor"]

log = get_logger("supervisor")

STATUS_LINE_BYTES_MAX = 1024 * 1024
"""A child that writes more than this without a newline is not one of ours."""

_EVENTS = frozenset({"waiting", "ready", "loaded", "error"})


class Running:
    """A process of the instance, from its start, or its discovery, to its exit."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        """What it is: "gateway", "host 0". Changes when a spare takes its place."""
        self.pid = pid
        self.exited = trio.Event()
        self.started_at = trio.current_time()
        """By trio's clock; of a process that was found, when it was."""

    @property
    def outcome(self) -> str:
        """How the process ended, in words."""
        raise NotImplementedError

    @property
    def error(self) -> str | None:
        """The text of its last `error` report."""
        return None

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        raise NotImplementedError

    async def stop(self, grace_seconds: float, *, hurry_seconds: float = 0.0) -> None:
        """Ask it to stop, and kill it when it has not within `grace_seconds`; returns when it has exited.

        `hurry_seconds` before it would be killed it is asked a second time, unless it has no more than that
        in all; 0: it is not.

        Cancellation: the process has been asked, and may still run.
        """
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)  # a process that is stopped obeys when it goes on
        async with trio.open_nursery() as nursery:
            if 0 < hurry_seconds < grace_seconds:
                nursery.start_soon(self._ask_again, grace_seconds - hurry_seconds)
            ended = await self.ends_within(grace_seconds)
            nursery.cancel_scope.cancel()
        if not ended:
            log.warning(
                "killed: it did not stop in time", child=self.name, pid=self.pid, after_s=grace_seconds
            )
            self.signal(signal.SIGKILL)
            await self.exited.wait()

    async def _ask_again(self, after_seconds: float) -> None:
        await trio.sleep(after_seconds)
        self.signal(signal.SIGTERM)

    async def ends_within(self, seconds: float) -> bool:
        """Whether it has exited after so long at most; from SAY_SECONDS on the log says that it is waited
        for.
        """
        what = {"child": self.name, "pid": self.pid, "at_most_s": round(seconds, 1)}
        with trio.move_on_after(seconds):
            async with named(log, "waiting for the end of a process", lambda: what):
                await self.exited.wait()
        return self.exited.is_set()

    async def kill(self) -> None:
        """Kill it; returns when it has exited. Shielded: nothing can refuse SIGKILL."""
        self.signal(signal.SIGKILL)
        with trio.CancelScope(shield=True):
            await self.exited.wait()


class Child(Running):
    """One process that this supervisor has started.

    `settled` is set by its first report, or by its exit if it made none. `exited` is set when the process
    has been reaped and its reports have been read to the end.
    """

    def __init__(self, name: str, process: trio.Process, status_fd: int) -> None:
        super().__init__(name, process.pid)
        self.settled = trio.Event()
        self.reports: dict[str, dict[str, Any]] = {}
        """The last report of each kind, beats excepted."""
        self.beat_at: float | None = None
        """When its last beat was read, by trio's clock; in the future while it need not have begun."""
        self._verdict: str | None = None
        self._process = process
        self._status = trio.lowlevel.FdStream(status_fd)
        self._status_fd = status_fd
        self._listening = True
        self._news = trio.Event()

    def __repr__(self) -> str:
        return f"<{self.name}, pid {self.pid}, {self.outcome if self.exited.is_set() else 'running'}>"

    @property
    def outcome(self) -> str:
        """How the process ended, in words."""
        if self._verdict is not None:
            return self._verdict
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
    def was_killed(self) -> bool:
        """Whether SIGKILL has ended it, and it was not this process that had a reason for that."""
        return self._verdict is None and self._process.returncode == -signal.SIGKILL

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
        self._news.set()

    async def _read_reports(self) -> None:
        pending = b""
        while chunk := await self._status.receive_some():
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._take_report(line)
            if len(pending) > STATUS_LINE_BYTES_MAX:
                log.error("status line too long, no more is read", child=self.name, pid=self.pid)
                break
        self._listening = False

    def _take_report(self, line: bytes) -> None:
        try:
            given = json.loads(line)
            event = str(given["event"])
        except (ValueError, TypeError, KeyError):
            log.error("unreadable status line", child=self.name, pid=self.pid, line=line[:200])
            return
        if event == "beat":
            self.beat_at = trio.current_time()
        elif event in _EVENTS:
            self.reports[event] = given
            self.settled.set()
            self._news.set()
            self._news = trio.Event()

    async def said(self, event: str) -> bool:
        """Wait until it has made this report. False: it has made an `error` report, or exited, before."""
        while event not in self.reports and "error" not in self.reports and not self.exited.is_set():
            await self._news.wait()
        return event in self.reports and "error" not in self.reports and not self.exited.is_set()

    def expect_beats(self, first_within_seconds: float) -> None:
        """From now on it is to beat, and may take so long for the first time."""
        if self.beat_at is None:
            self.beat_at = trio.current_time() + first_within_seconds

    def silent_seconds(self, now: float) -> float | None:
        """Give for how long it has not beaten. None: it need not, its end is known, or there are reports in
        the pipe that have not been read yet, so that nothing is known.
        """
        if self.beat_at is None or not self._listening:
            return None
        if self._verdict is not None or self._process.returncode is not None:
            return None
        poll = select.poll()
        poll.register(self._status_fd, select.POLLIN)
        return None if poll.poll(0) else now - self.beat_at

    def condemn(self, verdict: str) -> None:
        """Kill it for the reason given, which becomes its `outcome`."""
        self._verdict = verdict
        self.signal(signal.SIGKILL)

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

    async def _close_pipes(self) -> None:
        with trio.CancelScope(shield=True):
            await self._status.aclose()
            if self._process.stdin is not None:
                await self._process.stdin.aclose()


class Survivor(Running):
    """A process that another supervisor has started and left behind: known by its pidfd, and silent."""

    def __init__(self, name: str, pid: int, pidfd: int) -> None:
        """`pidfd` is owned from here on, until `attend` has returned."""
        super().__init__(name, pid)
        self._pidfd = pidfd

    def __repr__(self) -> str:
        return f"<{self.name}, pid {self.pid}, left by another supervisor>"

    @property
    def outcome(self) -> str:
        """How the process ended: its parent alone would be told."""
        return "ended" if self.exited.is_set() else "still running"

    async def attend(self) -> None:
        """Await its exit, and let go of it. Cancellation: it runs on, and is not known any more."""
        try:
            await trio.lowlevel.wait_readable(self._pidfd)  # pidfd_open(2): when the process terminates
            self.exited.set()
        finally:
            os.close(self._pidfd)
            self._pidfd = -1

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self._pidfd >= 0 and not self.exited.is_set():
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return
