"""The supervisor: starts keeper, gateway and hosts, keeps them running, replaces them, stops them in order.

Owns the listening socket and the order of start, takeover and stop; who serves in which place is
`hibernation.keepers`', `gateways`' and `hosts`'. It runs no user code, opens no database and carries no
message, so that there is little that can kill it; and when it dies all the same, its children go on serving
(S34): they are in sessions of their own and nothing ties their life to it.

A later start on the same data directory takes them over. The keeper stays as it is, and has the listener.
New hosts are loaded, and take the old ones' places; then a new gateway takes the old one's. Until the new
hosts have loaded nothing is changed, and if they do not, the others serve on.

At the stop the gateway goes first, since the close turns of its sockets need the hosts; then the hosts; then
the keeper, with which the last duplicates of sockets close. What is under way when the stop is asked for, the
gateway and the hosts have `Timing.drain_seconds` together; who comes too late for that has `alone_seconds`,
and is killed then. A host cannot know how much of that time others have taken: `hurry_seconds` before its own
is over it gets a second SIGTERM, cuts short what it waits for, and ends in order. So a stop is bounded,
whatever clients and rooms do; and whoever is waited for longer than a second is named in the log.

Peers: `broker.gateway.__main__`, `broker.host`, `hibernation.keeper`; what is said between them is in
`hibernation.configuration`. Orders come through `hibernation.control`.
"""

import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import trio

from hibernation.child import Running
from hibernation.children import Children, LoadError
from hibernation.control import Control, OrderRefused
from hibernation.gateway_line import GatewayLine, Line, LineError
from hibernation.gateways import Gateways
from hibernation.handover import HandoverError
from hibernation.hosts import Hosts, ReloadError
from hibernation.keepers import Keepers
from hibernation.listener import (
    AddressInUse,
    StartError,
    bind_listener,
    remove_stale_socket,
    require_address,
)
from hibernation.logs import get_logger, why
from hibernation.plan import Commands, Plan, Timing
from hibernation.processes import ProcessList
from hibernation.waiting import named
from storage.directory import socket_path

__all__ = ["Plan", "Supervisor"]

log = get_logger("supervisor")

CONNECT_SECONDS = 5.0
"""For a gateway to take a line."""

LOOK_AGAIN_SECONDS = 0.02
"""Between two looks at what no event tells of."""


class Supervisor:
    """Runs one instance from start to stop. `run` is called once."""

    def __init__(
        self,
        plan: Plan,
        *,
        announce: Callable[[tuple[str, int]], None],
        changes: Callable[[], AsyncIterator[Collection[object]]] | None = None,
        commands: Commands | None = None,
        timing: Timing | None = None,
        connect: Callable[[], Awaitable[Line]] | None = None,
    ) -> None:
        """`announce` is called once, with the address, when the instance answers.

        `changes` gives what was saved in the app's folder, after which hosts are reloaded, and nothing (an
        empty collection) as soon as it watches: from then on no save is missed. None: never reload by itself.
        `connect` opens a line to the gateway; by default to the one that listens in the data directory.

        Raises `DataDirectoryError` when the instance cannot run in this data directory.
        """
        self._plan = plan
        self._announce = announce
        self._changes = changes
        self._commands = commands or Commands()
        self._timing = timing or Timing.of(plan.settings)
        self._connect = connect or self._connect_gateway
        self._processes = ProcessList(plan.data)
        self._serving = trio.CancelScope()
        self._draining = trio.CancelScope()
        self._shielded: WeakSet[trio.CancelScope] = WeakSet()
        self._saved = trio.Event()
        self._failure: StartError | None = None
        self._taking_over = False
        self._taken: socket.socket | None = None
        self._emptied = False
        self._stopping = trio.Event()
        self._served = trio.Event()
        #: When all is to be over, by trio's clock; set by the request to stop.
        self._ends_at = math.inf
        orders = {"reload": self._reload, "upgrade": self._upgrade, "drain": self._empty}
        self._control = Control(plan.data, orders)
        self._children: Children
        self._keepers: Keepers
        self._gateways: Gateways
        self._hosts: Hosts
        socket_path(plan.data)  # fails now, not in a child

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start everything, or take it over; keep it running; return when it has been stopped by a signal.

        SIGTERM, SIGINT or SIGHUP drains and stops; a second one kills. All children have exited when this
        returns or raises. Raises `StartError` when the instance did not come up; what another supervisor had
        left behind serves on then.
        """
        caught = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            caught.append(signal.SIGHUP)
        left: list[tuple[str, int]] = []
        with trio.open_signal_receiver(*caught) as signals:
            async with trio.open_nursery() as nursery:
                self._children = Children(nursery, self._note)
                nursery.start_soon(self._obey, signals)
                nursery.start_soon(self._name_what_is_under_way)
                if self._timing.hang_seconds is not None:
                    nursery.start_soon(self._children.judge, self._timing.hang_seconds)
                task_status.started()
                try:
                    with self._serving:
                        await self._serve(nursery)
                    self._served.set()
                    if self._failure is not None and self._taking_over:
                        left = self._children.release()
                    with self._draining:
                        await self._drain()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._children.kill()
                    if self._taken is not None:
                        self._taken.close()
                nursery.cancel_scope.cancel()
        if left:
            self._processes.write(left)
        else:
            self._processes.remove()
            for name in ("gateway.sock", "keeper.sock"):
                remove_stale_socket(self._plan.data / name)
        if self._failure is not None:
            raise self._failure

    def request_reload(self) -> None:
        """Have all hosts replaced by such with the code as it is now, as after a save."""
        self._saved.set()

    def request_stop(self) -> None:
        """Drain and stop; asked a second time, kill."""
        if self._serving.cancel_called:
            self._draining.cancel()
            for scope in self._shielded:
                scope.cancel()
        self._begin_to_stop()

    def _begin_to_stop(self) -> None:
        if not self._serving.cancel_called:
            self._ends_at = trio.current_time() + self._timing.drain_seconds
            for scope in self._shielded:
                scope.deadline = min(scope.deadline, self._ends_at)
        self._serving.cancel()
        self._stopping.set()

    def _hurry(self, scope: trio.CancelScope) -> None:
        """The scope shields what has to be put in order before the stop, which it holds up no longer than
        `_ends_at`; the second request cancels it.
        """
        self._shielded.add(scope)
        scope.deadline = min(scope.deadline, self._ends_at)
        if self._draining.cancel_called:
            scope.cancel()

    def _note(self, children: list[tuple[str, int]]) -> None:
        self._processes.write([("supervisor", os.getpid()), *children])

    # Start and stop

    async def _serve(self, outer: trio.Nursery) -> None:
        plan = self._plan
        found = self._find()
        self._taking_over = self._children.patient = bool(found.all)
        try:
            listener = await self._get_listener(found)
        except LoadError as failure:
            self._fail(failure.text, usage=False)
            return
        except StartError as error:
            self._fail(str(error), usage=error.usage)
            return
        self._hosts = Hosts(plan, self._commands, self._timing, self._children, hurry=self._hurry)
        self._gateways = Gateways(
            plan,
            self._commands,
            self._timing,
            self._children,
            listener,
            self._connect,
            nursery=outer,
            hurry=self._hurry,
            changed=self._gateway_changed,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keepers.keep, listener)
            await nursery.start(self._control.serve)
            async with self._control.turn("start", wait=True):
                if self._changes is not None:
                    # Before the code is loaded: a save in between is to be seen.
                    await nursery.start(self._watch, self._changes)
                if self._taking_over:
                    await self._take_over(nursery, found)
                else:
                    await self._bring_up(nursery)
                self._taking_over = self._children.patient = False
                self._hosts.settle()
                self._announce(listener.getsockname()[:2])
            nursery.start_soon(self._gateways.keep_spare)

    async def _get_listener(self, found: "_Found") -> socket.socket:
        """Have a keeper, and give the listener that it is to hold. Raises LoadError, StartError."""
        plan = self._plan
        self._keepers = Keepers(plan, self._commands, self._timing, self._children)
        if found.keeper is None or not await self._keepers.adopt(found.keeper):
            await self._keepers.start()
        if plan.listener is not None:
            return plan.listener
        host, port = plan.bind
        listener = await self._keepers.find_listener() if found.keeper or found.gateways else None
        if listener is None:
            try:
                listener = bind_listener(host, port, receive_buffer_bytes=plan.settings.receive_buffer_bytes)
            except AddressInUse as error:
                named = ", ".join(str(gateway.pid) for gateway in found.gateways)
                remedy = f"end what was left there with: broker stop --data {plan.data}"
                if not named:
                    remedy = "choose another"
                text = f"{error}" + (f" (process {named}, which no keeper knows)" if named else "")
                raise StartError(f"{text}; {remedy}") from error
            self._taken = listener
        else:
            self._taken = listener
            require_address(listener, host, port)
        return listener

    async def _bring_up(self, nursery: trio.Nursery) -> None:
        """Start everything anew, side by side."""
        nursery.start_soon(self._keep_gateway)
        async with trio.open_nursery() as starting:
            for index in range(self._plan.hosts):
                starting.start_soon(self._start_host, index, nursery)
            await self._gateways.ready.wait()

    async def _start_host(self, index: int, nursery: trio.Nursery) -> None:
        try:
            await self._hosts.start(index)
        except LoadError as failure:
            await self._give_up(failure)
        else:
            nursery.start_soon(self._keep_host, index)

    async def _keep_gateway(self) -> None:
        self._fail(await self._gateways.keep(), usage=False)

    async def _keep_host(self, index: int) -> None:
        self._fail(await self._hosts.keep(index), usage=False)

    def _fail(self, text: str, *, usage: bool) -> None:
        """Give up the start: what was started is stopped, then `run` raises."""
        if self._failure is None:
            self._failure = StartError(text, usage=usage)
        self._begin_to_stop()

    async def _give_up(self, failure: LoadError) -> None:
        """`_fail`, and wait for the cancellation that follows: nothing is announced meanwhile."""
        self._fail(failure.text, usage=failure.by_app)
        await trio.sleep_forever()

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            again = self._serving.cancel_called
            log.info("stopping at once" if again else "stopping", signal=signal.Signals(number).name)
            self.request_stop()

    async def _drain(self) -> None:
        children, timing = self._children, self._timing
        for idle in ("spare", "successor"):
            await children.outlast(idle, 0)
        async with trio.open_nursery() as nursery:
            # The gateway first: the close turns of its sockets still need the hosts.
            nursery.start_soon(children.stop, "gateway", self._left_of(timing.drain_seconds))
            nursery.start_soon(children.outlast, "leaving", self._left_of(timing.drain_seconds))
        seconds = self._left_of(timing.finish_seconds)
        await children.stop("host", seconds, hurry_seconds=timing.hurry_seconds)
        await children.stop("keeper", timing.keeper_seconds)

    def _left_of(self, seconds: float) -> float:
        """What a child may take of that, now that others have taken their part of the time until the end."""
        return min(seconds, max(self._ends_at - trio.current_time(), self._timing.alone_seconds))

    async def _name_what_is_under_way(self) -> None:
        """Where the stop has to wait for something that is put in order first, say so."""
        await self._stopping.wait()
        async with named(
            log,
            "stopping: what is under way is put in order first",
            lambda: {"order": self._control.under_way},
        ):
            await self._served.wait()

    # Takeover

    def _find(self) -> "_Found":
        """Take charge of what another supervisor has left."""
        found = _Found()
        for name, pid, pidfd in self._processes.open_surviving():
            if name == "supervisor":  # it is about to exit: it does not hold the data directory any more
                os.close(pidfd)
                continue
            survivor = self._children.adopt(name, pid, pidfd)
            found.all.append(survivor)
            if name == "keeper":
                found.keeper = survivor
            elif name == "gateway":
                found.gateways.append(survivor)
            elif name.startswith("host"):
                found.hosts.append(survivor)
            else:
                found.others.append(survivor)
        if found.all:
            # All at once: a list with some of them would hide the others, if this process died now.
            self._children.tell()
            log.warning("the former supervisor has died: taking over", **dict(self._children.listed))
        return found

    async def _take_over(self, nursery: trio.Nursery, found: "_Found") -> None:
        """Replace hosts and gateway; until the new hosts are loaded nothing is touched."""
        serving = await self._find_serving(found.gateways)
        try:
            await self._hosts.take_places(found.hosts)
        except LoadError as failure:
            await self._give_up(failure)
        for index in range(self._plan.hosts):
            nursery.start_soon(self._keep_host, index)
        late = [process for process in (*found.gateways, *found.others) if process is not serving]
        nursery.start_soon(self._end_late, late)
        if serving is not None:
            self._gateways.adopt(serving)
            if not await self._linked():
                log.error("the gateway does not have all hosts yet")
            try:
                await self._gateways.upgrade()
            except HandoverError as error:
                log.error("the gateway of the former supervisor stays", pid=serving.pid, **why(error.text))
        nursery.start_soon(self._keep_gateway)
        await self._gateways.ready.wait()

    async def _find_serving(self, gateways: "Collection[Running]") -> Running | None:
        """Give the one of these processes that answers as the gateway. Where an upgrade was under way there
        may be two, of which one resumes or leaves by itself.
        """
        if not gateways:
            return None
        with trio.move_on_after(self._timing.freeze_seconds):
            while any(not gateway.exited.is_set() for gateway in gateways):
                try:
                    line = await self._connect()
                    try:
                        await line.ask("stats", self._timing.freeze_seconds)
                    finally:
                        await line.aclose()
                except LineError:
                    await trio.sleep(LOOK_AGAIN_SECONDS)
                    continue
                return next((gateway for gateway in gateways if gateway.pid == line.pid), None)
        return None

    async def _end_late(self, late: "Collection[Running]") -> None:
        """See those off that do not serve: they have nothing that the keeper has not as well."""
        with trio.move_on_after(self._timing.resume_seconds):
            for process in late:
                await process.exited.wait()
        for process in late:
            if not process.exited.is_set():
                log.warning("killed: it is in nobody's service", child=process.name, pid=process.pid)
                await process.kill()

    # Orders, and saves

    async def _reload(self, _: Mapping[str, Any]) -> dict[str, Any]:
        try:
            reloaded = await self._hosts.reload(linked=self._linked)
        except ReloadError as error:
            raise OrderRefused(error.text) from error
        assert reloaded is not None  # nothing supersedes it
        return {
            "hosts": reloaded.pids,
            "seconds": reloaded.seconds,
            "new_parties": reloaded.new_parties,
            "gone_parties": reloaded.gone_parties,
        }

    async def _upgrade(self, _: Mapping[str, Any]) -> dict[str, Any]:
        try:
            upgraded = await self._gateways.upgrade()
        except HandoverError as error:
            raise OrderRefused(error.text) from error
        return {"gateway": upgraded.pid, "pause_seconds": upgraded.pause_seconds}

    async def _empty(self, order: Mapping[str, Any]) -> dict[str, Any]:
        """Carry out `broker drain`."""
        seconds = order.get("seconds", self._plan.settings.drain)
        if not isinstance(seconds, int | float) or not 0 <= seconds <= 3600:
            raise OrderRefused("seconds is a number from 0 to 3600")
        try:
            line = await self._connect()
            try:
                answer = await line.ask("drain", seconds + self._timing.drain_seconds, seconds=seconds)
            finally:
                await line.aclose()
        except LineError as error:
            raise OrderRefused(str(error)) from error
        self._emptied = True
        return answer if isinstance(answer, dict) else {}

    async def _gateway_changed(self) -> None:
        """Another gateway serves: one that follows a gateway which was drained takes nobody either."""
        if self._emptied:
            try:
                await self._empty({"seconds": 0})
            except OrderRefused as refused:
                log.error("the new gateway is not drained as the former was", reason=refused.text)

    async def _linked(self) -> bool:
        """Wait until the gateway has links to all hosts, and all of them answer there; False when late."""
        with trio.move_on_after(self._timing.load_seconds):
            while True:
                try:
                    line = await self._connect()
                    try:
                        while True:
                            stats = await line.ask("stats", self._timing.load_seconds)
                            if set(self._hosts.pids) <= set(stats["hosts"]):
                                return True
                            await trio.sleep(LOOK_AGAIN_SECONDS)
                    finally:
                        await line.aclose()
                except LineError:
                    await trio.sleep(LOOK_AGAIN_SECONDS)
        return False

    async def _connect_gateway(self) -> Line:
        return await GatewayLine.connect(socket_path(self._plan.data), CONNECT_SECONDS)

    async def _watch(
        self,
        changes: Callable[[], AsyncIterator[Collection[object]]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Reload after each save."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reload_on_saves)
            begun = False
            try:
                async for saved in changes():
                    if not begun:
                        begun = True
                        task_status.started()
                    if saved:
                        self.request_reload()
            except OSError as error:
                log.error("no reload on save: the app's folder cannot be watched", reason=str(error))
            if not begun:
                task_status.started()

    async def _reload_on_saves(self) -> None:
        while True:
            await self._saved.wait()
            async with self._control.turn("reload", wait=True):
                done = False
                while not done:
                    self._saved = trio.Event()
                    done = await self._reload_saved()

    async def _reload_saved(self) -> bool:
        """Reload. False: something was saved meanwhile, so that it has to be loaded again."""
        try:
            return await self._hosts.reload(superseded=self._saved) is not None
        except ReloadError as error:
            log.error("the new code does not load, the old goes on", **why(error.text))
            return True


@dataclass
class _Found:
    """What another supervisor has left, by what it is."""

    keeper: Running | None = None
    gateways: list[Running] = field(default_factory=list)
    hosts: list[Running] = field(default_factory=list)
    others: list[Running] = field(default_factory=list)
    all: list[Running] = field(default_factory=list)
