"""The hosts of an instance, as its supervisor sees them: one place per index, and who has it.

Owns which host serves where, its revival when it dies, and the reload. The life of a host:

    spawn ──▶ loading ──"loaded"──▶ waiting ──"go"──▶ serving ──▶ exited
                 └──"error", exit, time──▶ killed

At most one host of an index is serving (S5): "go" is said only after the exit of its predecessor has been
awaited. A reload loads new hosts for all places beside the old ones, which serve on undisturbed until every
new one has said "loaded" and they agree about the app; if one does not, all new ones are killed and nothing
has changed (S32). Then place after place changes hands. Peers: `broker.host`; `hibernation.supervisor`.
"""

import os
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

import trio

from hibernation.child import Child, Running
from hibernation.children import Backoff, Children, LoadError
from hibernation.configuration import GO_LINE, HostConfig
from hibernation.logs import get_logger, why
from hibernation.plan import KILL_SECONDS, Commands, Plan, Timing

__all__ = ["Hosts", "ReloadError", "Reloaded"]

log = get_logger("supervisor")


class ReloadError(Exception):
    """The code was not replaced, or not everywhere; the text says why, and what runs now."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


@dataclass(frozen=True, slots=True)
class Reloaded:
    """What a reload has brought."""

    pids: list[int]
    """The new hosts, by index."""
    seconds: float
    new_parties: list[str]
    gone_parties: list[str]
    """Their rooms keep connections and storage, and run no code."""


class _Place:
    """One index. `lock` is held by whoever puts another host in the place of the one that has it."""

    def __init__(self, index: int, timing: Timing) -> None:
        self.index = index
        self.host: Running | None = None
        self.parties: list[dict[str, object]] | None = None
        self.lock = trio.Lock()
        self.replaced = trio.Event()
        self.backoff = Backoff(timing)


class Hosts:
    """All places. `keep` runs once for each; the others are called while it runs."""

    def __init__(
        self,
        plan: Plan,
        commands: Commands,
        timing: Timing,
        children: Children,
        *,
        hurry: Callable[[trio.CancelScope], None],
    ) -> None:
        """`hurry` is given each scope that shields what must be ended in order, to cancel it in a hurry."""
        self._plan = plan
        self._commands = commands
        self._timing = timing
        self._children = children
        self._hurry = hurry
        self._places = [_Place(index, timing) for index in range(plan.hosts)]
        self._settled = False

    @property
    def pids(self) -> list[int]:
        """The processes that serve, or did last, by index."""
        return [place.host.pid for place in self._places if place.host is not None]

    async def start(self, index: int) -> None:
        """Load the first host of a place and let it serve. Raises LoadError."""
        place = self._places[index]
        await self._let_go(place, await self._load(index))

    async def keep(self, index: int) -> str:
        """Have the place served for as long as this runs, whatever dies. Returns only when the first host
        gives an error of its own before `settle` was called: the text.
        """
        place = self._places[index]
        while True:
            host = place.host
            assert host is not None
            await host.exited.wait()
            async with place.lock:  # whoever replaces it is done
                pass
            if place.host is not host:
                continue
            if host.error is not None and not self._settled:
                return host.error
            await self._revive(place, host)

    def settle(self) -> None:
        """The instance is up: from here on a host that fails is started again, whatever it says."""
        self._settled = True

    # Revival

    async def _revive(self, place: _Place, dead: Running) -> None:
        """Have another host in the place of a dead one, however many tries that takes."""
        reason, alive_seconds = dead.error or dead.outcome, trio.current_time() - dead.started_at
        while place.host is dead:
            delay_seconds = place.backoff.delay(alive_seconds)
            log.error(
                "host ended, starting it again",
                host=place.index,
                pid=dead.pid,
                in_s=delay_seconds,
                **why(reason),
            )
            # A reload puts another one there, too.
            with trio.move_on_after(delay_seconds):
                await place.replaced.wait()
            if place.host is not dead:
                return
            try:
                fresh = await self._load_unless(place.replaced, place.index)
            except LoadError as failure:
                reason, alive_seconds = failure.text, 0.0
                continue
            if fresh is None:
                return
            async with place.lock:
                if place.host is dead:
                    await self._let_go(place, fresh)
                    return
            await fresh.kill()

    async def _load_unless(self, event: trio.Event, index: int) -> Child | None:
        """Load a host. None: the event came first. Raises LoadError."""
        loaded: Child | None = None
        failure: LoadError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_when, event, nursery.cancel_scope)
            try:
                loaded = await self._load(index)
            except LoadError as error:
                failure = error
            nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure
        return loaded

    async def _load(self, index: int) -> Child:
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

    async def _let_go(self, place: _Place, fresh: Child) -> None:
        """Say "go": nobody else has the place's shards."""
        place.host = fresh
        place.parties = fresh.reports["loaded"].get("parties")
        place.replaced.set()
        place.replaced = trio.Event()
        await fresh.say(GO_LINE, last=True)
        fresh.expect_beats(self._timing.load_seconds)  # it has to open, and perhaps to mend, its shards

    # Reload

    async def reload(
        self,
        *,
        linked: Callable[[], Awaitable[bool]] | None = None,
        superseded: trio.Event | None = None,
    ) -> Reloaded | None:
        """Replace all hosts by such with the code as it is now.

        Args:
            linked: Waits until the gateway has links to all of them; False when it is late. None: do not wait
                for that.
            superseded: There is newer code still: while hosts are only loaded, give up and return None.

        Raises ReloadError. Cancellation: every place has a host, the old or the new; what was loaded for
        nothing has been killed.
        """
        began = trio.current_time()
        before = self._party_names()
        fresh = await self._load_all(superseded)
        if fresh is None:
            return None
        failures: list[str] = []
        try:
            for place in self._places:
                with trio.move_on_after(self._swap_seconds, shield=True) as scope:
                    self._hurry(scope)
                    failure = await self._replace(place, fresh.pop(place.index))
                if scope.cancelled_caught:
                    failures.append(f"the old host {place.index} did not end")
                elif failure:
                    failures.append(failure)
        finally:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await _kill_all(fresh.values())
        if failures:
            raise ReloadError(f"{'; '.join(failures)}; the other hosts run the new code")
        pids = self.pids
        if linked is not None and not await linked():
            raise ReloadError(
                "the new code runs, but the gateway does not have all its hosts; its log may say why"
            )
        after = self._party_names()
        seconds = trio.current_time() - began
        gone = sorted(before - after)
        log.info("new code is running", pids=pids, seconds=round(seconds, 3), gone_parties=gone)
        return Reloaded(pids, seconds, sorted(after - before) if before else [], gone)

    async def take_places(self, found: Collection[Running]) -> None:
        """Replace hosts that another supervisor has left by new ones of ours. Raises LoadError, and then the
        ones found serve on. They may be more or fewer than ours, and have their shards dealt out otherwise:
        so all have exited before the first of ours is told to go.
        """
        try:
            fresh = await self._load_all(None)
        except ReloadError as error:
            raise LoadError(error.text, by_app=True) from error
        assert fresh is not None
        with trio.move_on_after(self._swap_seconds, shield=True) as scope:
            self._hurry(scope)
            async with trio.open_nursery() as nursery:
                for host in found:
                    log.info("host of the former supervisor ends", host=host.name, pid=host.pid)
                    nursery.start_soon(self._end, host)
            for place in self._places:
                await self._let_go(place, fresh[place.index])

    async def _load_all(self, superseded: trio.Event | None) -> dict[int, Child] | None:
        """Load a host for each place, and see that they agree. None when superseded; raises ReloadError."""
        fresh: dict[int, Child] = {}
        reason: str | None = None
        at_once = trio.CapacityLimiter(max(2, os.cpu_count() or 1))

        async def load(index: int) -> None:
            nonlocal reason
            try:
                async with at_once:
                    fresh[index] = await self._load(index)
            except LoadError as failure:
                if reason is None:
                    reason = failure.text
                loading.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as watching:
                if superseded is not None:
                    watching.start_soon(_cancel_when, superseded, watching.cancel_scope)
                async with trio.open_nursery() as loading:
                    for place in self._places:
                        loading.start_soon(load, place.index)
                watching.cancel_scope.cancel()
            if reason is None and len(fresh) < len(self._places):
                await _kill_all(fresh.values())
                return None
            reason = reason or _disagreement(fresh)
        except BaseException:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await _kill_all(fresh.values())
            raise
        if reason is not None:
            await _kill_all(fresh.values())
            raise ReloadError(reason)
        return fresh

    async def _replace(self, place: _Place, fresh: Child) -> str | None:
        """Put a loaded host in the place of the one that is there; gives why not."""
        async with place.lock:
            old = place.host
            assert old is not None
            if not fresh.exited.is_set():
                await self._end(old)
            if fresh.exited.is_set():  # where the old one has ended too, `keep` sees to the place
                return f"the new host {place.index} ended before its turn: {fresh.error or fresh.outcome}"
            await self._let_go(place, fresh)
            log.info("host replaced", host=place.index, old=old.pid, new=fresh.pid)
        return None

    async def _end(self, host: Running) -> None:
        """Stop a host whose place another has."""
        await host.stop(self._timing.finish_seconds, hurry_seconds=self._timing.hurry_seconds)

    @property
    def _swap_seconds(self) -> float:
        """In which old hosts have ended and new ones been told to go, whoever stops meanwhile."""
        return self._timing.finish_seconds + KILL_SECONDS

    def _party_names(self) -> set[str]:
        return {str(party["name"]) for place in self._places for party in place.parties or ()}


def _disagreement(fresh: dict[int, Child]) -> str | None:
    """Say in which way hosts that were loaded one after another have different code."""
    described = {index: host.reports["loaded"].get("parties") for index, host in fresh.items()}
    first = described[0]
    for index, parties in described.items():
        if parties != first:
            return f"the app changed while it was being loaded: host {index} has other parties than host 0"
    return None


async def _kill_all(children: Collection[Child]) -> None:
    for child in list(children):
        await child.kill()


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()
