"""The child processes of a supervisor: how they are started, watched and ended.

Owns each child from the system call that makes it to the one that reaps it: none is ever lost, whatever is
cancelled. Also owns the judgement that one hangs. Decides nothing about which child should run: that is
`hibernation.supervisor`, `gateways` and `hosts`. What one process is, is `hibernation.child`.
"""

import math
import os
import signal
import subprocess
import sysconfig
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import trio

from hibernation.child import Child, Running, Survivor
from hibernation.configuration import GatewayConfig, HostConfig, KeeperConfig
from hibernation.logs import get_logger
from hibernation.plan import KILL_SECONDS, Timing

__all__ = ["Backoff", "Children", "LoadError"]

log = get_logger("supervisor")


START_TRIES = 5
"""How often a child is started that is killed before it has said anything: by an operator, or for its
memory."""


PATIENCE_SECONDS = 1.0
"""Between further tries, where clients wait for them."""


class Backoff:
    """How long to wait before a child that died is started again: 0.1 s doubling to 10 s. Pure.

    `urgent`: for a child whose absence all clients notice, and which runs nobody's code; the first time there
    is no wait, and later on none that is long.
    """

    def __init__(self, timing: Timing, *, urgent: bool = False) -> None:
        self._timing = timing
        self._first_seconds = 0.0 if urgent else timing.backoff_first_seconds
        self._limit_seconds = timing.backoff_urgent_seconds if urgent else timing.backoff_limit_seconds
        self._next_seconds = self._first_seconds

    def delay(self, alive_seconds: float) -> float:
        """Give the seconds to wait after a child that lived for `alive_seconds`."""
        if alive_seconds >= self._timing.backoff_reset_seconds:
            self._next_seconds = self._first_seconds
        seconds = self._next_seconds
        doubled = max(seconds * 2, self._timing.backoff_first_seconds)
        self._next_seconds = min(doubled, self._limit_seconds)
        return seconds


MakeConfig = Callable[[int], GatewayConfig | HostConfig | KeeperConfig]
"""Makes a child's configuration when the number of its status pipe is known."""


class LoadError(Exception):
    """A child did not come up; the text says why."""

    def __init__(self, text: str, *, by_app: bool) -> None:
        super().__init__(text)
        self.text = text
        self.by_app = by_app
        """The host said so itself: nothing is wrong with the machine."""


class Children:
    """All processes that one supervisor has started and not yet reaped."""

    def __init__(self, nursery: trio.Nursery, changed: Callable[[list[tuple[str, int]]], None]) -> None:
        """`nursery` must outlive the processes; `changed` gets names and ids on each start and exit."""
        self.patient = False
        """Sockets of clients are waiting for what is started: giving up would close them."""
        self._nursery = nursery
        self._changed = changed
        self._running: list[Running] = []
        self._found: dict[Survivor, trio.CancelScope] = {}

    @property
    def listed(self) -> list[tuple[str, int]]:
        """Names and process ids of all that run."""
        return [(running.name, running.pid) for running in self._running]

    def adopt(self, name: str, pid: int, pidfd: int) -> Survivor:
        """Take charge of a process that another supervisor has left behind; `pidfd` is owned from here on.

        Nobody is told: when all have been adopted it is time for `tell`.
        """
        survivor = Survivor(name, pid, pidfd)
        self._running.append(survivor)
        self._found[survivor] = scope = trio.CancelScope()
        self._nursery.start_soon(self._attend_found, survivor, scope)
        return survivor

    async def _attend_found(self, survivor: Survivor, scope: trio.CancelScope) -> None:
        with scope:
            scope.shield = True
            await survivor.attend()
        self._found.pop(survivor, None)
        if survivor in self._running:
            self._running.remove(survivor)
            self.tell()

    def release(self) -> list[tuple[str, int]]:
        """Let go of all that `adopt` has found, as they are, and give their names and process ids."""
        released = [(survivor.name, survivor.pid) for survivor in self._found]
        for survivor, scope in list(self._found.items()):
            self._running.remove(survivor)
            scope.cancel()
        self._found.clear()
        return released

    def rename(self, child: Running, name: str) -> None:
        """Have it take another's place."""
        child.name = name
        self.tell()

    async def start(
        self, name: str, command: Sequence[str], config: MakeConfig, wanted: str, *, within_seconds: float
    ) -> Child:
        """Start a child, give it its configuration and wait for its first report, which must be `wanted`.

        One that somebody kills meanwhile is started again: START_TRIES times in all, or with `patient` for as
        long as it takes, later on a second apart. Raises `LoadError` when the report is another, or does not
        come in time, or the system refuses a process. Then, and when cancelled, the child has been killed.
        """
        for tries in count(1):
            child, line = await self._spawn(name, command, config)
            try:
                with trio.move_on_after(within_seconds):
                    await child.say(line, last=wanted == "ready")  # others wait for "go"
                    await child.settled.wait()
                if child.error is not None:
                    raise LoadError(child.error, by_app=wanted == "loaded")
                if child.exited.is_set():
                    if child.was_killed and (self.patient or tries < START_TRIES):
                        log.error(
                            "killed while it was starting, starting it again", child=name, pid=child.pid
                        )
                        if tries >= START_TRIES:
                            await trio.sleep(PATIENCE_SECONDS)
                        continue
                    text = f"the {name} ended while it was starting: {child.outcome}"
                    raise LoadError(text, by_app=False)
                if wanted not in child.reports:
                    text = f"the {name} did not start within {within_seconds:g} s"
                    raise LoadError(text, by_app=wanted == "loaded")
            except BaseException:
                with trio.move_on_after(KILL_SECONDS, shield=True):
                    await child.kill()
                raise
            break
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
        self.tell()
        return child, made.to_json().encode() + b"\n"

    async def _attend(self, child: Child) -> None:
        # Shielded: the end of `run` waits for the children's exit, which this is.
        with trio.CancelScope(shield=True):
            await child.attend()
        self._running.remove(child)
        self.tell()

    def tell(self) -> None:
        """Say who runs."""
        self._changed(self.listed)

    async def judge(self, hang_seconds: float) -> None:
        """Kill each child that is to beat and has not for `hang_seconds`; runs until it is cancelled.

        A child is judged by what it has said, so its reports have to have been read; and by a clock that went
        on while it stood still, so nobody is judged for a time in which this process stood still as well.
        """
        pause_seconds = min(1.0, hang_seconds / 4)
        looked_at = trio.current_time()
        excused_until = -math.inf
        while True:
            await trio.sleep(pause_seconds)
            now = trio.current_time()
            if now - looked_at > 2 * pause_seconds + 0.5:
                excused_until = now + hang_seconds
            looked_at = now
            if now < excused_until:
                continue
            for child in self._running:
                silent_seconds = child.silent_seconds(now) if isinstance(child, Child) else None
                if silent_seconds is not None and silent_seconds > hang_seconds:
                    assert isinstance(child, Child)
                    log.error(
                        "killed: it hangs", child=child.name, pid=child.pid, silent_s=round(silent_seconds, 1)
                    )
                    child.condemn(f"killed: it gave no sign of life for {silent_seconds:.1f} s")

    async def stop(self, kind: str, grace_seconds: float, *, hurry_seconds: float = 0.0) -> None:
        """Stop all whose name begins with `kind`, at once, as `Running.stop` does."""
        async with trio.open_nursery() as nursery:
            for child in self._running:
                if child.name.startswith(kind):
                    nursery.start_soon(partial(child.stop, grace_seconds, hurry_seconds=hurry_seconds))

    async def outlast(self, kind: str, grace_seconds: float) -> None:
        """Wait for the exit of those whose name begins with `kind`, and kill what is left after that."""
        async with trio.open_nursery() as nursery:
            for child in self._running:
                if child.name.startswith(kind):
                    nursery.start_soon(_outlast, child, grace_seconds)

    async def kill(self) -> None:
        """Kill all that still run; returns when they have exited."""
        for child in self._running:
            child.signal(signal.SIGKILL)
        for child in list(self._running):
            await child.exited.wait()


async def _outlast(child: Running, grace_seconds: float) -> None:
    if not await child.ends_within(grace_seconds):
        await child.kill()


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
