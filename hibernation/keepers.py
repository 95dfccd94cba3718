"""The keeper of an instance, as its supervisor sees it: started first, started again at once, ended last.

Owns the keeper's place, and that the listener is pinned in whichever keeper has it: a gateway's death loses
no socket that a keeper holds, and a supervisor's death not the listener (S34). What gateways keep there they
fill in again themselves. Peers: `hibernation.keeper`, through `hibernation.keeping`.
"""

import math
import socket

import trio

from hibernation.child import Running
from hibernation.children import Backoff, Children, LoadError
from hibernation.configuration import KeeperConfig
from hibernation.keeping import KeeperClient, KeeperError, KeeperGone
from hibernation.logs import get_logger, why
from hibernation.plan import Commands, Plan, Timing

__all__ = ["LISTENER", "Keepers"]

log = get_logger("supervisor")

LISTENER = "listener"
"""The name under which the listening socket is pinned."""

ASK_AGAIN_SECONDS = 0.1


class Keepers:
    """The keeper's place: one process at a time."""

    def __init__(self, plan: Plan, commands: Commands, timing: Timing, children: Children) -> None:
        self._plan = plan
        self._commands = commands
        self._timing = timing
        self._children = children
        self._keeper: Running | None = None
        self._listener: socket.socket | None = None

    async def start(self) -> None:
        """Start one. Raises LoadError."""
        self._keeper = await self._children.start(
            "keeper",
            self._commands.keeper,
            lambda status_fd: KeeperConfig(data=self._plan.data, status_fd=status_fd),
            "ready",
            within_seconds=self._timing.load_seconds,
        )

    async def adopt(self, found: Running) -> bool:
        """Take charge of a keeper that was found. False: it does not answer, and has been killed."""
        try:
            listener = await trio.to_thread.run_sync(self._take_listener)
        except KeeperError as error:
            log.error("killed: the keeper does not answer", pid=found.pid, reason=str(error))
            await found.kill()
            return False
        if listener is not None:
            listener.close()
        self._keeper = found
        return True

    async def find_listener(self) -> socket.socket | None:
        """Give the listener that is pinned. A keeper that was started just now may still get it from a
        gateway that refills it, which is waited for a little.
        """
        deadline = trio.current_time() + self._timing.keeper_seconds
        while True:
            try:
                found = await trio.to_thread.run_sync(self._take_listener)
            except KeeperError as error:
                log.error("the keeper could not be asked for the listener", reason=str(error))
                return None
            if found is not None or trio.current_time() >= deadline:
                return found
            await trio.sleep(ASK_AGAIN_SECONDS)

    def _take_listener(self) -> socket.socket | None:
        client = KeeperClient.connect(self._plan.data)
        try:
            fd = client.take_named(LISTENER, self._timing.keeper_seconds)
        finally:
            client.close()
        return None if fd is None else socket.socket(fileno=fd)

    async def keep(self, listener: socket.socket) -> None:
        """Have `listener` pinned in a keeper for as long as this runs, whatever dies."""
        backoff = Backoff(self._timing, urgent=True)
        while True:
            keeper = self._keeper
            assert keeper is not None
            reason = await self._stay_with(keeper, listener)
            alive_seconds = trio.current_time() - keeper.started_at
            while True:
                delay_seconds = backoff.delay(alive_seconds)
                log.error("keeper ended, starting another", pid=keeper.pid, in_s=delay_seconds, **why(reason))
                await trio.sleep(delay_seconds)
                try:
                    await self.start()
                except LoadError as failure:
                    reason, alive_seconds = failure.text, 0.0
                else:
                    break

    async def _stay_with(self, keeper: Running, listener: socket.socket) -> str:
        """Pin the listener, see now and then that the keeper answers, and give how it ended."""
        kept = False
        while True:
            try:
                await self._pin(listener)
            except KeeperError as error:
                if not keeper.exited.is_set():
                    log.error("killed: the keeper does not answer", pid=keeper.pid, reason=str(error))
                    await keeper.kill()
            else:
                if not kept:
                    log.info("keeper holds the listener", pid=keeper.pid)
                kept = True
            with trio.move_on_after(self._timing.hang_seconds or math.inf):
                await keeper.exited.wait()
                return keeper.error or keeper.outcome

    async def _pin(self, listener: socket.socket) -> None:
        client = KeeperClient.connect(self._plan.data)
        seconds = max(self._timing.keeper_seconds, self._timing.hang_seconds or 0.0)
        try:
            number = client.pin(LISTENER, listener.fileno())
            with trio.fail_after(seconds):
                while client.acknowledged < number:
                    await trio.lowlevel.wait_readable(client.fd)
                    client.receive()
        except trio.TooSlowError:
            raise KeeperGone(f"it was asked to keep the listener, {seconds:g} s ago") from None
        finally:
            client.close()
