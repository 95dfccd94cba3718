"""Crons in the host: `on_cron` of the main party, once for each tick in the whole deployment (S31).

Owns the ticks of the host that has the first shard of the instance, and there the record of what has been
run. A tick is recorded on disk before its hook is called: so none is run twice, whatever dies, is reloaded or
sets the clock back; one whose host dies in the hook is not run again. Peers: `hibernation.cron` (when, pure),
`hibernation.commits`, `storage.crons`.

A clock that is set back by no more than two hours repeats no tick; beyond that it counts as one that was
wrong before, and crons begin anew.

What is missed while no host was there is run once, late: the last tick of each cron, if it is not older than
`cron_late_seconds`. A cron that is new, or whose expression has changed, begins now.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import trio

from hibernation.commits import Commits
from hibernation.cron import Schedule
from hibernation.errors import TurnTimeout
from hibernation.logs import get_logger
from hibernation.party import MAIN, Party
from hibernation.pool import Pool
from hibernation.room import Lobby
from hibernation.settings import Settings
from hibernation.wall_clock import now_ms, wait_until_ms
from storage.crons import CronRow, read_crons
from storage.shards import Shard

__all__ = ["HOME_SHARD", "Cron", "Crons", "Ticks", "main_party", "schedule_text"]

#: The shard that says which ticks have been run; its host runs them.
HOME_SHARD: Final = 0
#: A record that lies further in the future was made by a clock that was wrong.
FUTURE_MS: Final = 2 * 3600 * 1000
MINUTE_MS: Final = 60_000
#: How often it is looked whether what waits during probation may begin.
LOOK_SECONDS: Final = 0.25

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

log = get_logger("crons")


@dataclass(frozen=True, slots=True)
class Cron:
    """What `on_cron` is given.

    Attributes:
        name: As in `crons`.
        expression: As it stands there.
        scheduled_at: The minute that it is run for, UTC.
    """

    name: str
    expression: str
    scheduled_at: datetime


class Ticks:
    """Which tick is next (pure).

    Args:
        schedules: By name.
        stored: What was run last.
        now_ms: The time.
        late_ms: How late a missed tick is still run.
    """

    def __init__(
        self, schedules: Mapping[str, Schedule], stored: Mapping[str, CronRow], now_ms: int, late_ms: int
    ) -> None:
        self._schedules = schedules
        self._late_ms = late_ms
        self._seen_ms = now_ms
        #: Those of which nothing is known: they begin now.
        self.fresh: list[CronRow] = []
        self._next: dict[str, int] = {}
        for name, schedule in schedules.items():
            row, text = stored.get(name), schedule_text(schedule)
            if row is None or row.schedule != text or row.last_ms > now_ms + FUTURE_MS:
                row = CronRow(name, text, now_ms)
                self.fresh.append(row)
            self._next[name] = self._after(name, row.last_ms)

    @property
    def next_ms(self) -> int | None:
        """When the next tick is due."""
        return min(self._next.values(), default=None)

    def due(self, now_ms: int) -> list[CronRow]:
        """The ticks that are to be run now: of each cron one at most, the last that is not in the future."""
        rows = []
        if now_ms < self._seen_ms - FUTURE_MS:  # the clock was wrong, or is
            self._next = {name: self._after(name, now_ms) for name in self._next}
            self._seen_ms = now_ms
        self._seen_ms = max(self._seen_ms, now_ms)
        for name, tick in self._next.items():
            if tick > now_ms:
                continue
            newest = self._newest(name, tick, now_ms)
            self._next[name] = self._after(name, newest)
            if now_ms - newest <= self._late_ms:
                rows.append(CronRow(name, schedule_text(self._schedules[name]), newest))
        return rows

    def _newest(self, name: str, tick: int, now_ms: int) -> int:
        """The last tick that is not in the future; `tick` is one of them."""
        # Halving, not counting: a broker that was down for long has missed very many.
        low, high = tick // MINUTE_MS - 1, now_ms // MINUTE_MS
        while high - low > 1:
            middle = (low + high) // 2
            if self._after(name, middle * MINUTE_MS) <= now_ms:
                low = middle
            else:
                high = middle
        return high * MINUTE_MS

    def _after(self, name: str, milliseconds: int) -> int:
        moment = self._schedules[name].next_after(_EPOCH + timedelta(milliseconds=milliseconds))
        return (moment - _EPOCH) // timedelta(milliseconds=1)


def schedule_text(schedule: Schedule) -> str:
    """What a schedule is told by: with another one it begins anew."""
    return f"{schedule.expression} {schedule.timezone}"


class Crons:
    """See the module.

    Args:
        party: The main party, or None: there is none, or another host has the first shard.
        shards: The open shards of the host.
        settings: Of the instance.
        lobby: Makes what hooks are told.
        pool: Of the host, with the note of what runs.
        commits: Takes what is to be stored.
        flush: Has it stored.
        log_failure: Says in the log what went wrong.
    """

    def __init__(
        self,
        party: Party | None,
        shards: Mapping[int, Shard],
        settings: Settings,
        lobby: Callable[[], Lobby],
        pool: Pool,
        commits: Commits,
        flush: Callable[[], None],
        log_failure: Callable[..., None],
    ) -> None:
        self._party = party if party is not None and "on_cron" in party.hooks else None
        self._shard = shards.get(HOME_SHARD)
        self._settings = settings
        self._lobby = lobby
        self._pool = pool
        self._commits = commits
        self._flush = flush
        self._log_failure = log_failure
        self._ticks = Ticks({}, {}, 0, 0)
        self._open = False
        self._wanted = trio.Event()
        self._nursery: trio.Nursery
        #: Names of those that are about to run, or run.
        self._running: set[str] = set()
        #: By name: the tick whose hook was called last.
        self._started: dict[str, CronRow] = {}
        self.runs = 0
        self.failures = 0

    @property
    def busy(self) -> bool:
        """Whether a hook runs."""
        return bool(self._running)

    def counts(self) -> dict[str, int]:
        """For `stats`."""
        return {"cron_runs": self.runs, "cron_failures": self.failures}

    async def run(self) -> None:
        """Run what is due, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            while True:
                self._wanted = trio.Event()
                next_ms = None
                if self._open and not self._pool.retiring:
                    for row in self._ticks.due(now_ms()):
                        self._claim(row)
                    next_ms = self._ticks.next_ms
                await wait_until_ms(next_ms, self._wanted)

    def open(self) -> None:
        """There is a gateway, and all that was staged before is on disk, or void."""
        if self._party is None or self._shard is None or not self._party.crons:
            return
        late_ms = int(self._settings.cron_late_seconds * 1000)
        self._ticks = Ticks(self._party.crons, read_crons(self._shard.read), now_ms(), late_ms)
        for row in self._ticks.fresh:
            self._commits.claim_tick(HOME_SHARD, row, None)
        self._open = True
        self._wanted.set()

    def close(self) -> None:
        """The gateway has gone. What runs goes on; what is due waits for the next one."""
        self._open = False

    def _claim(self, row: CronRow) -> None:
        """Record a tick; its hook is called when that is on disk."""
        if row.name in self._running:
            log.warning("a cron is due and still runs: this tick is left out", cron=row.name)
            return
        self._commits.claim_tick(HOME_SHARD, row, self._claimed)
        self._flush()

    def _claimed(self, row: CronRow) -> None:
        # A claim that waits for the disk outlives its gateway, and is not seen there when the next one comes:
        # then the same tick is claimed once more.
        if self._started.get(row.name) == row:
            return
        self._started[row.name] = row
        self._running.add(row.name)
        self._nursery.start_soon(self._call, row)

    async def _call(self, row: CronRow) -> None:
        party = self._party
        assert party is not None
        try:
            while self._pool.probation is not None and self._pool.probation.holds:  # noqa: ASYNC110
                await trio.sleep(LOOK_SECONDS)
            note = self._pool.running.enter()
            try:
                await self._call_hook(party, row)
            finally:
                self._pool.running.leave(note)
                if self._pool.probation is not None:
                    self._pool.look_on()
        finally:
            self._running.discard(row.name)

    async def _call_hook(self, party: Party, row: CronRow) -> None:
        self.runs += 1
        when = _EPOCH + timedelta(milliseconds=row.last_ms)
        cron = Cron(row.name, party.crons[row.name].expression, when)
        arguments = (cron, self._lobby())[: party.specs["on_cron"].parameters]
        seconds = party.settings(self._settings).turn_timeout
        try:
            with trio.move_on_after(seconds) as deadline:  # noqa: ASYNC912 - it is the user's hook that waits
                result = party.cls.on_cron(*arguments)
                if isinstance(result, Awaitable):
                    await result
            if deadline.cancelled_caught:
                raise TurnTimeout("on_cron", seconds)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - the app's code may raise anything
            self.failures += 1
            self._log_failure("on_cron failed", None, error, party=party.name, cron=row.name)


def main_party(parties: Sequence[Party]) -> Party | None:
    """The party whose crons are run."""
    return next((party for party in parties if MAIN in (party.name, *party.aliases)), None)
