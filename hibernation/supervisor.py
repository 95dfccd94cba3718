"""The supervisor: binds the listener, starts gateway and hosts, keeps them running, stops them in order.

Owns the listening socket, the children and the order of start, reload and stop. It runs no user code, opens
no database and carries no message, so that there is little that can kill it; and when it dies all the same,
its children go on serving (S34): they are in sessions of their own and nothing ties their life to it.
Its peers are `broker.gateway.__main__` and `broker.host`; what is said between them is in
`hibernation.configuration`.

The life of a host, as seen from here:

    spawn ──▶ loading ──"loaded"──▶ waiting ──"go"──▶ serving ──▶ exited
                 └──"error", exit, time──▶ killed

At most one host of an index is serving (S5): "go" is said only after the exit of its predecessor has been
awaited. New code is loaded beside the old, which serves until the new has said "loaded" and is not disturbed
when it never does (S32). A child's exit is awaited on its pidfd, and its number is not reused before that.
"""

import math
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import trio

from hibernation.children import Backoff, Child, Children, Commands, LoadError, Timing
from hibernation.configuration import GO_LINE, GatewayConfig, HostConfig
from hibernation.listener import StartError, remove_stale_socket
from hibernation.logs import get_logger
from hibernation.processes import ProcessList
from hibernation.settings import Settings
from storage.directory import socket_path

__all__ = ["Plan", "Supervisor"]

log = get_logger("supervisor")


@dataclass(frozen=True, slots=True)
class Plan:
    """What one instance is to run."""

    app: str
    data: Path
    """The data directory, absolute, locked by the caller for as long as the supervisor runs."""
    listener: socket.socket
    settings: Settings
    hosts: int = 1
    shard_count: int = 4
    dev: bool = False
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)


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
    ) -> None:
        """`announce` is called once, with the address, when the instance answers.

        `changes` gives what was saved in the app's folder, after which hosts are reloaded, and nothing (an
        empty collection) as soon as it watches: from then on no save is missed. None: never reload by itself.

        Raises `StartError` or `DataDirectoryError` when the instance cannot run in this data directory.
        """
        self._plan = plan
        self._announce = announce
        self._changes = changes
        self._commands = commands or Commands()
        self._timing = timing or Timing.of(plan.settings)
        self._children: Children
        self._processes = ProcessList(plan.data)
        self._reload_wanted = [trio.Event() for _ in range(plan.hosts)]
        self._gateway_ready = trio.Event()
        self._hosts_serving = [trio.Event() for _ in range(plan.hosts)]
        self._serving = trio.CancelScope()
        self._draining = trio.CancelScope()
        self._failure: StartError | None = None
        socket_path(plan.data)  # fails now, not in a child
        self._refuse_survivors()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start everything, keep it running, and return when it has been stopped by a signal.

        SIGTERM, SIGINT or SIGHUP drains and stops; a second one kills. All children have exited when this
        returns or raises. Raises `StartError` when the instance did not come up.
        """
        caught = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
            caught.append(signal.SIGHUP)
        with trio.open_signal_receiver(*caught) as signals:
            async with trio.open_nursery() as nursery:
                self._children = Children(nursery, self._note)
                self._note([])
                nursery.start_soon(self._obey, signals)
                task_status.started()
                try:
                    with self._serving:
                        await self._serve()
                    with self._draining:
                        await self._drain()
                finally:
                    with trio.CancelScope(shield=True):
                        await self._children.kill()
                nursery.cancel_scope.cancel()
        self._processes.remove()
        remove_stale_socket(socket_path(self._plan.data))
        if self._failure is not None:
            raise self._failure

    def request_reload(self) -> None:
        """Have each host replaced by one with the code as it is now."""
        for event in self._reload_wanted:
            event.set()

    def request_stop(self) -> None:
        """Drain and stop; asked a second time, kill."""
        if self._serving.cancel_called:
            self._draining.cancel()
        self._serving.cancel()

    def _refuse_survivors(self) -> None:
        survivors = self._processes.surviving()
        if survivors:
            named = ", ".join(f"{name} (pid {pid})" for name, pid in survivors)
            raise StartError(
                f"{self._plan.data} is still served by {named}, whose supervisor has died; "
                f"end them with: broker stop --data {self._plan.data}"
            )

    def _note(self, children: list[tuple[str, int]]) -> None:
        self._processes.write([("supervisor", os.getpid()), *children])

    # Start and stop

    async def _serve(self) -> None:
        async with trio.open_nursery() as keepers:
            keepers.start_soon(self._keep_gateway)
            if self._changes is not None:
                # Before the code is loaded: a save in between is to be seen.
                await keepers.start(self._watch, self._changes)
            for index in range(self._plan.hosts):
                keepers.start_soon(self._keep_host, index)
            await self._gateway_ready.wait()
            for event in self._hosts_serving:
                await event.wait()
            self._announce(self._plan.listener.getsockname()[:2])

    def _fail(self, text: str, *, usage: bool) -> None:
        """Give up the start: everything is stopped, then `run` raises."""
        if self._failure is None:
            self._failure = StartError(text, usage=usage)
        self._serving.cancel()

    async def _obey(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            again = self._serving.cancel_called
            log.info("stopping at once" if again else "stopping", signal=signal.Signals(number).name)
            self.request_stop()

    async def _drain(self) -> None:
        # The gateway first: the close turns of its sockets still need the hosts.
        await self._children.stop("gateway", self._timing.drain_seconds)
        await self._children.stop("host", self._timing.finish_seconds)

    # Gateway

    async def _keep_gateway(self) -> None:
        backoff = Backoff(self._timing)
        while True:
            began = trio.current_time()
            try:
                gateway = await self._start_gateway()
            except LoadError as failure:
                if not self._gateway_ready.is_set():
                    self._fail(failure.text, usage=False)
                    return
                reason = failure.text
            else:
                self._gateway_ready.set()
                await gateway.exited.wait()
                reason = gateway.error or gateway.outcome
            delay_seconds = backoff.delay(trio.current_time() - began)
            log.error("gateway ended, starting it again", in_s=delay_seconds, **_why(reason))
            await trio.sleep(delay_seconds)

    async def _start_gateway(self) -> Child:
        remove_stale_socket(socket_path(self._plan.data))
        return await self._children.start(
            "gateway",
            self._commands.gateway,
            self._gateway_config,
            "ready",
            within_seconds=math.inf if self._gateway_ready.is_set() else 2 * self._timing.load_seconds,
        )

    def _gateway_config(self, status_fd: int) -> GatewayConfig:
        plan = self._plan
        host, port = plan.listener.getsockname()[:2]
        return GatewayConfig(
            data=plan.data,
            listener_fd=plan.listener.fileno(),
            status_fd=status_fd,
            settings=plan.settings,
            dev=plan.dev,
            address=(host, port),
            hosts=plan.hosts,
            shard_count=plan.shard_count,
        )

    # Hosts

    async def _keep_host(self, index: int) -> None:
        backoff = Backoff(self._timing)
        try:
            host = await self._load_host(index)
        except LoadError as failure:
            self._fail(failure.text, usage=failure.by_app)
            return
        await host.say(GO_LINE, last=True)
        self._hosts_serving[index].set()
        while True:
            # Here `host` is the one that was told to go.
            await _first_of(host.exited, self._reload_wanted[index])
            if host.exited.is_set():
                if host.error is not None and not self._gateway_ready.is_set():
                    self._fail(host.error, usage=False)
                    return
                host = await self._revive_host(index, host, backoff)
            else:
                fresh = await self._load_changed(index)
                if fresh is None:
                    continue
                await host.stop(self._timing.finish_seconds)
                host = fresh
                log.info("new code is running", host=index, pid=host.pid)
            await host.say(GO_LINE, last=True)

    async def _load_host(self, index: int) -> Child:
        """Start a host and wait until it has loaded the app."""

        def config(status_fd: int) -> HostConfig:
            plan = self._plan
            return HostConfig(
                data=plan.data,
                index=index,
                shards=tuple(range(index, plan.shard_count, plan.hosts)),
                shard_count=plan.shard_count,
                app=plan.app,
                status_fd=status_fd,
                settings=plan.settings,
                dev=plan.dev,
                variables=plan.variables,
            )

        return await self._children.start(
            f"host {index}", self._commands.host, config, "loaded", within_seconds=self._timing.load_seconds
        )

    async def _revive_host(self, index: int, dead: Child, backoff: Backoff) -> Child:
        """Give a loaded host after the old one's death, however many tries that takes."""
        reason, alive_seconds = dead.error or dead.outcome, trio.current_time() - dead.started_at
        while True:
            delay_seconds = backoff.delay(alive_seconds)
            log.error("host ended, starting it again", host=index, in_s=delay_seconds, **_why(reason))
            # A save may be what mends it.
            with trio.move_on_after(delay_seconds):
                await self._reload_wanted[index].wait()
            self._reload_wanted[index] = trio.Event()
            try:
                return await self._load_host(index)
            except LoadError as failure:
                reason, alive_seconds = failure.text, 0.0

    async def _load_changed(self, index: int) -> Child | None:
        """Load the code as it is now, and once more whenever it changes meanwhile.

        Returns None, and says why, when it does not load.
        """
        while True:
            await trio.lowlevel.checkpoint()
            self._reload_wanted[index] = trio.Event()
            loaded: Child | None = None
            reason = ""
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when, self._reload_wanted[index], nursery.cancel_scope)
                try:
                    loaded = await self._load_host(index)
                except LoadError as failure:
                    reason = failure.text
                nursery.cancel_scope.cancel()
            if loaded is not None:
                return loaded
            if reason:
                log.error("the new code does not load, the old goes on", host=index, **_why(reason))
                return None

    async def _watch(
        self,
        changes: Callable[[], AsyncIterator[Collection[object]]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
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


def _why(reason: str) -> dict[str, str]:
    """A reason as a field of a log line; one of several lines stands below it, as tracebacks do."""
    return {"exception" if "\n" in reason else "reason": reason}


async def _first_of(*events: trio.Event) -> None:
    """Return when one of the events is set."""
    async with trio.open_nursery() as nursery:
        for event in events:
            nursery.start_soon(_cancel_when, event, nursery.cancel_scope)


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
