"""The machine under a kit: one gateway and one host, the real ones, in this process.

Owns the data directory, the starts and the deaths of both, and what outlives them: the keeper, the lines of
clients, the note of what a host was doing. What runs in them is `broker.gateway.core` and `hibernation.host`
with all their parts; only what lies outside is another: sockets (`_sockets`), keeper (`_keeper`), the threads
that commit (`_writer`), and the supervisor, whose place this takes. Must not know clients or tests.

A death is a point after which nothing of the process reaches the outside: its sockets refuse, its databases
are closed, its memory that outlives it is as it was at that moment. Its tasks are then cancelled, so room
code sees `trio.Cancelled`, where a killed process would see nothing.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import trio
from cbor2 import loads

from broker.gateway.core import Gateway, Surroundings
from broker.gateway.effects import WITH_EFFECTS
from broker.gateway.ledger import CURSOR, NAMES, Ledger
from broker.gateway.links import HostLink
from broker.testing._keeper import Keeper, Session
from broker.testing._sockets import Backlog, Killed, Listener, Process
from broker.testing._writer import InlineWriter
from hibernation import wire
from hibernation.cells import Batch, Cell, Event, Worker
from hibernation.configuration import GatewayConfig, HostConfig
from hibernation.host import Host
from hibernation.party import Party
from hibernation.running import running_path
from hibernation.settings import Settings
from storage.directory import DataDirectory

__all__ = ["Machine"]

#: More shards would only cost more time to make.
SHARD_COUNT: Final = 1
#: Files in it cost no disk (shm_overview(7)); without it they lie where all temporary ones do.
MEMORY_FOLDER: Final = "/dev/shm"  # noqa: S108 - a folder of its own is made in it
#: Connections that a kit has room for.
CAPACITY: Final = 4096

#: Where a gateway can be told to die, beside after so many effects.
POINTS: Final = ("before_effects", "mid_frame", "after_effects")

Failure = Callable[[str, "Cell | None", BaseException, dict[str, Any]], None]


class _Steps:
    """The ledger's header, in which each effect is noted before it begins (G3): counts them, and kills before
    the first one that is too many.
    """

    def __init__(self, header: memoryview, most: int, die: Callable[[], None]) -> None:
        self._header = header
        self._left = most
        self._die = die

    def __getitem__(self, index: int) -> int:
        return int(self._header[index])

    def __setitem__(self, index: int, value: int) -> None:
        if index == CURSOR:
            if not self._left:
                self._die()
            self._left -= 1
        self._header[index] = value


class Machine:
    """See the module.

    Args:
        parties: The app's, checked.
        env: What rooms see as `room.env`.
        settings: Of the instance.
        dev: As `broker dev` would run it.
        failed: Told of everything that room code raises.
        evict_between_turns: Give each turn an object of its own.
    """

    def __init__(
        self,
        parties: list[Party],
        env: dict[str, str],
        settings: Settings,
        *,
        dev: bool,
        failed: Failure,
        evict_between_turns: bool,
    ) -> None:
        self.parties = parties
        self._env = env
        self._settings = settings
        self._dev = dev
        self._failed = failed
        self._evicts = evict_between_turns
        self.keeper = Keeper()
        self.backlog = Backlog()
        self.gateway: Gateway
        self.host: Host
        self._gateway_process = Process()
        self._host_process = Process()
        self._gateway_scope = trio.CancelScope()
        self._host_scope = trio.CancelScope()
        self._ending = False
        self.deaths = 0
        #: Deaths that were ordered and have not come.
        self._gateway_orders: list[str | int] = []
        self._host_orders: list[str | int] = []
        #: Objects of rooms made by hosts that have gone, by key.
        self._constructed: dict[str, int] = {}
        self._retire = trio.Event()
        self._retiring_for: list[Party] = []

    # --- Start and end ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        in_memory = MEMORY_FOLDER if os.access(MEMORY_FOLDER, os.W_OK | os.X_OK) else None
        folder = Path(tempfile.mkdtemp(prefix="broker-kit-", dir=in_memory))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Run until cancelled."""
        with self._folder() as folder, contextlib.ExitStack() as stack:
            data = folder / "data"
            directory = stack.enter_context(DataDirectory(data, shard_count=SHARD_COUNT))
            self.data = directory.path
            self._null = os.open(os.devnull, os.O_RDWR)
            stack.callback(os.close, self._null)
            stack.callback(self.backlog.close)
            stack.callback(self.keeper.close)
            ledger = Ledger.create(CAPACITY)
            for name in NAMES:
                self.keeper.name(name, os.dup(ledger.descriptors[name]))
            del ledger
            async with trio.open_nursery() as nursery:
                await nursery.start(self._gateways)
                await nursery.start(self._hosts)
                task_status.started()
                try:
                    await trio.sleep_forever()
                finally:
                    self._ending = True

    # --- The gateway ------------------------------------------------------------------------------

    async def _gateways(self, *, task_status: trio.TaskStatus[None]) -> None:
        """One gateway after the other."""
        while not self._ending:
            process = self._gateway_process = Process()
            self._gateway_scope = trio.CancelScope()
            gateway = self.gateway = Gateway(self._gateway_config(), self._surroundings(process))
            gateway.begin()
            try:
                with self._gateway_scope:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(gateway.calls.run)
                        nursery.start_soon(gateway.hub.run)
                        await nursery.start(gateway.http.run)
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
            except* Killed:
                pass
            finally:
                self._bury_gateway(gateway, process)

    def _gateway_config(self) -> GatewayConfig:
        return GatewayConfig(
            data=self.data,
            listener_fd=self.backlog.descriptor,
            status_fd=self._null,
            settings=self._settings,
            dev=self._dev,
            address=("127.0.0.1", 80),
            hosts=1,
            shard_count=SHARD_COUNT,
        )

    def _surroundings(self, process: Process) -> Surroundings:
        return Surroundings(
            take_from_keeper=lambda _data: (Session(self.keeper), self.keeper.take()),
            listener=lambda _descriptor: Listener.of(self.backlog, process),
            kept_socket=lambda _family, descriptor, _parked: self.backlog.adopt(descriptor, process),
            writer=InlineWriter,
        )

    def kill_gateway(self) -> None:
        """Kill it here and now: nothing that it still does reaches the outside."""
        if not self._gateway_process.dead:
            self.deaths += 1
            self._gateway_orders.clear()
            self._gateway_process.dead = True
            for name in NAMES:
                self.keeper.name(name, _copy(self.keeper.named[name]))
            self._gateway_scope.cancel()

    def _bury_gateway(self, gateway: Gateway, process: Process) -> None:
        process.end()
        for host in gateway.links.hosts:
            host._socket.close()
        if gateway.links._listener is not None:
            gateway.links._listener.close()
        for sock in gateway.lifecycle._lingering.values():
            sock.close()
        gateway.duplicates.leave()
        gateway.hub._epoll.close()
        gateway._writer.close()
        gateway.registry.close()

    def kill_gateway_at(self, point: str | int) -> None:
        """Kill it when it next carries out a message of the host: before the first effect, after so many of
        them, or after the last and before it has told the host.
        """
        gateway = self.gateway
        carry_out = gateway.effects.carry_out

        def die() -> None:
            self.kill_gateway()
            raise Killed

        def armed(host: HostLink, sequence: int, encoded: bytes | bytearray, items: list[Any]) -> None:
            if not any(_has_effects(item) for item in items):
                carry_out(host, sequence, encoded, items)
                return
            if point == "before_effects":
                die()
            if point == "mid_frame":
                self._gateway_process.tear = die
            elif isinstance(point, int):
                gateway.effects._header = _Steps(gateway.ledger.header, point, die)  # type: ignore[assignment]
            carry_out(host, sequence, encoded, items)
            die()

        if not isinstance(point, int) and point not in POINTS:
            raise ValueError(f"a gateway dies at a number of effects or at one of {POINTS}, not {point!r}")
        gateway.links.on_message = armed
        self._gateway_orders.append(point)

    # --- The host ---------------------------------------------------------------------------------

    async def _hosts(self, *, task_status: trio.TaskStatus[None]) -> None:
        """One host after the other."""
        while not self._ending:
            process = self._host_process = Process()
            self._host_scope = trio.CancelScope()
            host = self.host = Host(self._host_config(), self.parties, self._env, InlineWriter)
            self._attend(host, process)
            try:
                with self._host_scope:
                    async with trio.open_nursery() as nursery:
                        host.begin(nursery)
                        nursery.start_soon(self._retire_when_told, host)
                        task_status.started()
                        task_status = trio.TASK_STATUS_IGNORED
            except* Killed:
                pass
            finally:
                self._bury_host(host, process)

    def _host_config(self) -> HostConfig:
        return HostConfig(
            data=self.data,
            index=0,
            shards=tuple(range(SHARD_COUNT)),
            shard_count=SHARD_COUNT,
            app="",
            status_fd=self._null,
            settings=self._settings,
            dev=self._dev,
        )

    def _attend(self, host: Host, process: Process) -> None:
        """Hear of failures, and evict after turns."""
        turns, run = host._turns, host._turns.run

        def failure(text: str, cell: Cell | None, error: BaseException, more: dict[str, Any]) -> None:
            if not process.dead:
                self._failed(text, cell, error, more)

        async def run_and_evict(cell: Cell, worker: Worker, event: Event) -> None:
            await run(cell, worker, event)
            if cell.room is not None:
                cell.room._evict = True

        def die(error: BaseException) -> None:
            raise error

        turns.on_failure = failure
        host._commits._die = die  # type: ignore[method-assign]
        if self._evicts:
            turns.run = run_and_evict  # type: ignore[method-assign]

    def kill_host(self) -> None:
        """Kill it here and now."""
        if self._host_process.dead:
            return
        self.deaths += 1
        self._host_orders.clear()
        self._host_process.dead = True
        host = self.host
        for key, (wakes, _) in host._pool._recent.items():
            self._constructed[key] = self._constructed.get(key, 0) + wakes
        self._note = running_path(self.data, 0).read_bytes()
        if host._socket is not None:
            host._epoll.unregister(host._socket.fileno())
            host._socket.close()
            host._socket = None
        host._alarms.close()  # who follows the time would still look once
        host._crons.close()
        host._databases.close()
        for shard in host._shards.values():
            shard.close()
        self._host_scope.cancel()

    def kill_host_at(self, point: str) -> None:
        """Kill it when it next commits: before, or after the commit and before anybody hears of it."""
        commits = self.host._commits

        def die(batch: Batch) -> None:  # noqa: ARG001 - called in the place of either
            self.kill_host()
            raise Killed

        if point == "before_commit":
            commits._seal = die  # type: ignore[method-assign]
        elif point == "after_commit":
            commits._release = die  # type: ignore[method-assign]
        else:
            raise ValueError(f'a host dies at "before_commit" or "after_commit", not {point!r}')
        self._host_orders.append(point)

    def replace_host(self, parties: list[Party]) -> None:
        """Have it end its turns, and another one run these parties."""
        self._retiring_for = parties
        self._retire.set()

    async def _retire_when_told(self, host: Host) -> None:
        await self._retire.wait()
        self._retire = trio.Event()
        await host._retire()
        self.parties = self._retiring_for
        self._host_scope.cancel()

    def _bury_host(self, host: Host, process: Process) -> None:
        if host._socket is not None:
            host._socket.close()
        host._epoll.close()
        host._writer.close()
        if not process.dead:
            for key, (wakes, _) in host._pool._recent.items():
                self._constructed[key] = self._constructed.get(key, 0) + wakes
            for shard in host._shards.values():
                shard.close()
        host._blame.running.close()
        if process.dead:
            running_path(self.data, 0).write_bytes(self._note)

    # --- Sight ------------------------------------------------------------------------------------

    def constructions(self, key: str) -> int:
        """How many objects of this room there have been."""
        here = self.host._pool._recent.get(key)
        before = self._constructed.get(key, 0)
        return before + (here[0] if here is not None and not self._host_process.dead else 0)

    @property
    def ready(self) -> bool:
        """Whether gateway and host are there and know each other."""
        if self._gateway_process.dead or self._host_process.dead or self._retire.is_set():
            return False
        return self.gateway.links.ready and not self.host._pool.retiring

    @property
    def ordered(self) -> list[str | int]:
        """Deaths that were ordered and have not come."""
        return self._gateway_orders + self._host_orders

    def cancel_orders(self) -> None:
        """No process is to die at a point any more."""
        self._gateway_orders.clear()
        self._host_orders.clear()
        gateway, commits = self.gateway, self.host._commits
        gateway.links.on_message = gateway.effects.carry_out
        gateway.effects._header = gateway.ledger.header
        self._gateway_process.tear = None
        for name in ("_seal", "_release"):
            vars(commits).pop(name, None)


def _has_effects(item: list[Any]) -> bool:
    """Whether a result of a host's message orders anything."""
    if item[0] == wire.ROW:
        return any(_has_effects(each) for each in loads(item[3]))
    return item[0] in WITH_EFFECTS and bool(item[-1])


def _copy(descriptor: int) -> int:
    """Memory with the same content."""
    size = os.fstat(descriptor).st_size
    fresh = os.memfd_create("broker-kit", os.MFD_CLOEXEC)
    os.truncate(fresh, size)
    position = 0
    while position < size:
        position += os.sendfile(fresh, descriptor, position, size - position)
    os.lseek(fresh, 0, os.SEEK_SET)
    return fresh
