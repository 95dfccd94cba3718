"""The gateway of an instance, as its supervisor sees it: one that serves, one that is spare.

Owns who is the gateway, its revival, and the upgrade. A gateway needs half a second to load its modules, so
another stands by that has done that and waits (`handover`): when the gateway dies it only has to take the
sockets from the keeper. It costs the memory of a process that does nothing, and it has the code of the
gateway beside it, so that the code on disk is run by an upgrade alone.

    spawn ──▶ loading ──"waiting"──▶ spare, or successor ──"go"──▶ gateway ──▶ leaving ──▶ exited

At most one gateway serves: a spare is told to go after the exit of its predecessor has been awaited, a
successor after its predecessor has let go (`hibernation.handover`). Peers: `broker.gateway.__main__`,
`hibernation.supervisor`.
"""

import math
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

from hibernation.child import Child, Running
from hibernation.children import Backoff, Children, LoadError
from hibernation.configuration import GO_LINE, GatewayConfig
from hibernation.gateway_line import Line
from hibernation.handover import Handover, HandoverError
from hibernation.listener import remove_stale_socket
from hibernation.logs import get_logger, why
from hibernation.plan import KILL_SECONDS, Commands, Plan, Timing
from storage.directory import socket_path

__all__ = ["Gateways", "Upgraded"]

log = get_logger("supervisor")


@dataclass(frozen=True, slots=True)
class Upgraded:
    """What an upgrade has brought."""

    pid: int
    """The new gateway."""
    pause_seconds: float
    """For which nobody read from the sockets."""


class Gateways:
    """The gateway's place, and the spare's. `keep` and `keep_spare` run once; `upgrade` while they do."""

    def __init__(
        self,
        plan: Plan,
        commands: Commands,
        timing: Timing,
        children: Children,
        listener: socket.socket,
        connect: Callable[[], Awaitable[Line]],
        *,
        nursery: trio.Nursery,
        hurry: Callable[[trio.CancelScope], None],
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        """`connect` opens a line to the gateway that serves; `changed` is called when another one does.
        `hurry` is given each scope that shields what must be ended in order, to cancel it in a hurry.
        `nursery` sees off those who leave, also when this instance stops meanwhile.
        """
        self._nursery = nursery
        self._plan = plan
        self._commands = commands
        self._timing = timing
        self._children = children
        self._listener = listener
        self._connect = connect
        self._hurry = hurry
        self._changed = changed
        self._gateway: Running | None = None
        self._lock = trio.Lock()
        self._spare: Child | None = None
        self._spare_wanted = trio.Event()
        self._upgrades = 0
        self._loading: trio.Event | None = None
        """Set when the spare that is being loaded waits, or has failed to."""
        self.ready = trio.Event()
        """A gateway has been ready once: the instance has come up."""

    def adopt(self, found: Running) -> None:
        """Take charge of a gateway that was found serving."""
        self._gateway = found
        self.ready.set()

    async def keep(self) -> str:
        """Have a gateway serve for as long as this runs, whatever dies. Returns only when the first one does
        not come up, and no sockets wait for it: the reason.
        """
        backoff = Backoff(self._timing, urgent=True)
        while True:
            began = trio.current_time()
            gateway = self._gateway
            if gateway is None:
                try:
                    gateway = self._gateway = await self._start()
                except LoadError as failure:
                    if not (self.ready.is_set() or self._children.patient):
                        return failure.text
                    await self._wait(backoff, began, failure.text, None)
                    continue
                self.ready.set()
                self._want_spare()
                log.info("gateway is ready", pid=gateway.pid, after_s=round(trio.current_time() - began, 3))
                await self._changed()
            await gateway.exited.wait()
            async with self._lock:  # whoever replaces it is done
                if self._gateway is not gateway:
                    continue
                self._gateway = None
            await self._wait(backoff, gateway.started_at, gateway.error or gateway.outcome, gateway.pid)

    async def _wait(self, backoff: Backoff, began: float, reason: str, pid: int | None) -> None:
        delay_seconds = backoff.delay(trio.current_time() - began)
        log.error("gateway ended, starting it again", pid=pid, in_s=delay_seconds, **why(reason))
        await trio.sleep(delay_seconds)

    async def _start(self) -> Child:
        """Give a gateway that is ready. Raises LoadError."""
        remove_stale_socket(socket_path(self._plan.data))
        if self._loading is not None:  # a spare that is being loaded is ahead of any that is started now
            await self._loading.wait()
        spare, self._spare = self._spare, None
        if spare is not None and not spare.exited.is_set():
            self._children.rename(spare, "gateway")
            spare.started_at = trio.current_time()
            await spare.say(GO_LINE, last=True)
            if await spare.said("ready"):
                spare.expect_beats(0.0)
                return spare
            if spare.error is not None or not spare.was_killed:
                await spare.kill()
                raise LoadError(spare.error or spare.outcome, by_app=False)
            # Whoever killed the gateway has killed it too: nothing is wrong with it that could be waited for.
        waits = self.ready.is_set() or self._children.patient  # sockets do, at the keeper
        within_seconds = math.inf if waits else 2 * self._timing.load_seconds
        gateway = await self._children.start(
            "gateway",
            self._commands.gateway,
            lambda status_fd: self._config(status_fd, handover=False),
            "ready",
            within_seconds=within_seconds,
        )
        gateway.expect_beats(0.0)
        return gateway

    def _config(self, status_fd: int, *, handover: bool) -> GatewayConfig:
        plan = self._plan
        host, port = self._listener.getsockname()[:2]
        return GatewayConfig(
            data=plan.data,
            listener_fd=self._listener.fileno(),
            status_fd=status_fd,
            settings=plan.settings,
            dev=plan.dev,
            address=(host, port),
            hosts=plan.hosts,
            shard_count=plan.shard_count,
            handover=handover,
        )

    async def _load(self, name: str) -> Child:
        """Give a gateway that is loaded and waits for "go". Raises LoadError."""
        return await self._children.start(
            name,
            self._commands.gateway,
            lambda status_fd: self._config(status_fd, handover=True),
            "waiting",
            within_seconds=self._timing.load_seconds,
        )

    # The spare

    def _want_spare(self) -> None:
        self._spare_wanted.set()

    async def keep_spare(self) -> None:
        """Have a spare gateway for as long as this runs."""
        backoff = Backoff(self._timing)
        while True:
            await self._spare_wanted.wait()
            self._spare_wanted = trio.Event()
            await trio.sleep(self._timing.spare_seconds)
            while self._spare is None:
                began, upgrades = trio.current_time(), self._upgrades
                self._loading = trio.Event()
                try:
                    spare = await self._load("spare")
                except LoadError as failure:
                    self._end_loading()
                    delay_seconds = backoff.delay(trio.current_time() - began)
                    log.error("no spare gateway, trying again", in_s=delay_seconds, **why(failure.text))
                    await trio.sleep(delay_seconds)
                    continue
                self._spare = spare if upgrades == self._upgrades else None
                self._end_loading()
                if self._spare is None:
                    await spare.kill()  # it has the code of a gateway that has been replaced meanwhile
                    continue
                await _first_of(spare.exited, self._spare_wanted)
                if self._spare is not spare:
                    break  # it has its turn; the next is wanted when that has gone well
                if spare.exited.is_set():
                    self._spare = None
                    log.warning("spare gateway ended", pid=spare.pid, **why(spare.error or spare.outcome))
                    await trio.sleep(backoff.delay(trio.current_time() - spare.started_at))
                    if self._gateway is None or self._gateway.exited.is_set():
                        break  # the gateway comes first, and says when a spare is wanted

    def _end_loading(self) -> None:
        assert self._loading is not None
        self._loading.set()
        self._loading = None

    # Upgrade

    async def upgrade(self) -> Upgraded:
        """Replace the gateway by one with the code as it is now.

        Raises HandoverError, also when the new one does not load; the old one serves on then, or, if it has
        died, another one does. Cancellation: likewise.
        """
        try:
            successor = await self._load("successor")
        except LoadError as failure:
            raise HandoverError(f"{failure.text}; nothing was changed") from failure
        async with self._lock:
            old = self._gateway
            if old is None or old.exited.is_set():
                await successor.kill()
                raise HandoverError("the gateway has just died and is being started again; try once more")
            handover = Handover(
                old,
                successor,
                self._connect,
                self._timing,
                takes_over=lambda: self._children.rename(successor, "gateway"),
                hurry=self._hurry,
            )
            pause_seconds = await handover.run()
            self._gateway = successor
            successor.expect_beats(0.0)
            successor.started_at = trio.current_time()
            self._children.rename(old, "leaving")
            former, self._spare = self._spare, None
            if former is not None:
                former.signal(signal.SIGKILL)
            self._upgrades += 1
            self._want_spare()
            log.info("gateway replaced", old=old.pid, new=successor.pid, pause_s=round(pause_seconds, 4))
            try:
                await handover.dismiss()
            except BaseException:
                with trio.move_on_after(KILL_SECONDS, shield=True):
                    await handover.close()
                raise
        await self._changed()
        self._nursery.start_soon(self._see_off, old, handover)
        return Upgraded(successor.pid, pause_seconds)

    async def _see_off(self, old: Running, handover: Handover) -> None:
        """Wait for a gateway that was told to leave."""
        try:
            with trio.move_on_after(self._timing.drain_seconds):
                await old.exited.wait()
            if not old.exited.is_set():
                log.warning("killed: the old gateway has not left in time", pid=old.pid)
                await old.kill()
            else:
                log.info("the old gateway has left", pid=old.pid)
        finally:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await handover.close()


async def _first_of(*events: trio.Event) -> None:
    """Return when one of the events is set."""
    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(_cancel_when, event, nursery.cancel_scope)


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
