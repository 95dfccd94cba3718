"""Cron expressions: five fields in, points in time out (S31).

Owns what an expression may say and when it comes due. Pure: no clock, no task. Peers: `hibernation.party`,
which reads the expressions of a class, and `hibernation.crons`, which runs them.

Source: crontab(5) of Vixie cron. A field is a list of numbers, names, ranges and steps. Where day and weekday
are both restricted either is enough; a field that begins with * is not restricted. Its other dialects (L, W,
#, ?, a seventh field) are refused, with what to write instead.

Days of 23 and 25 hours, in a time zone that has them:

    all hours are named   the expression says how often an hour: every hour counts that there is, each once
    otherwise             it says what times of the day: one that the clock skips is due when it has skipped,
                          one that comes twice is due the first time
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Final

__all__ = ["CronError", "Schedule"]

#: How far a clock that is set back repeats itself, at most; a few zones have once repeated a day.
_REPEATED: Final = timedelta(hours=25)
_MINUTE: Final = timedelta(minutes=1)
_DAY: Final = timedelta(days=1)

_MACROS: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_LONGEST: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_PART: Final = re.compile(r"(?P<first>\*|\w+)(?:-(?P<last>\w+))?(?:/(?P<step>\w+))?", re.ASCII)


class CronError(ValueError):
    """An expression says nothing that can be run.

    `expression` is all of it, `field` the part that is at fault ("minute", …, or "" for the whole), `given`
    what stands there, `reason` what is wrong with it, and `remedy` what to write.
    """

    def __init__(self, expression: str, field: str, given: str, reason: str, remedy: str) -> None:
        where = f"its {field} {given!r}: " if field else ""
        super().__init__(f"{expression!r} is no cron expression: {where}{reason}; {remedy}")
        self.expression = expression
        self.field = field
        self.given = given
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class _Field:
    """One of the five: its name, its bounds, and the names that stand for numbers, the first for `least`."""

    name: str
    least: int
    most: int
    names: tuple[str, ...] = ()


_FIELDS: Final = (
    _Field("minute", 0, 59),
    _Field("hour", 0, 23),
    _Field("day of the month", 1, 31),
    _Field("month", 1, 12, _MONTHS),
    _Field("day of the week", 0, 7, _WEEKDAYS),
)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When a cron is due; made by `parse`."""

    expression: str
    timezone: tzinfo
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    #: 0 is Sunday.
    weekdays: frozenset[int]
    every_hour: bool
    any_day: bool
    any_weekday: bool

    @classmethod
    def parse(cls, expression: str, timezone: tzinfo = UTC) -> "Schedule":
        """Read an expression: five fields with spaces between them, or one of @hourly, @daily, @weekly,
        @monthly, @yearly. Names may be written in capitals.

        Raises:
            CronError: It is none, or never due.
        """
        text = expression.strip().lower()
        if text.startswith("@"):
            if text not in _MACROS:
                reason = "there is no such name"
                raise CronError(expression, "", "", reason, f"write one of {', '.join(_MACROS)}")
            text = _MACROS[text]
        parts = text.split()
        if len(parts) != len(_FIELDS):
            raise CronError(
                expression,
                "",
                "",
                f"it has {len(parts)} fields, not 5",
                'write minute, hour, day of the month, month and day of the week, such as "*/5 * * * *"',
            )
        minutes, hours, days, months, weekdays = (
            _read(expression, field, part) for field, part in zip(_FIELDS, parts, strict=True)
        )
        schedule = cls(
            expression=expression,
            timezone=timezone,
            minutes=tuple(sorted(minutes)),
            hours=tuple(sorted(hours)),
            days=frozenset(days),
            months=frozenset(months),
            weekdays=frozenset(day % 7 for day in weekdays),
            every_hour=len(hours) == 24,
            any_day=parts[2].startswith("*"),
            any_weekday=parts[4].startswith("*"),
        )
        if schedule.any_weekday and all(min(days) > _LONGEST[month - 1] for month in months):
            reason = "none of these months has such a day, so it is never due"
            raise CronError(expression, "day of the month", parts[2], reason, "write a day that there is")
        return schedule

    def next_after(self, moment: datetime) -> datetime:
        """When it is due next, UTC: the first whole minute after `moment`, which has a time zone."""
        moment = moment.astimezone(UTC)
        start = moment.astimezone(self.timezone).replace(tzinfo=None)
        if self._changes_about(moment):
            start -= _REPEATED  # what has been shown may be shown again
        best: datetime | None = None
        for wall in self._walls(start):
            first = wall.replace(tzinfo=self.timezone).astimezone(UTC)
            if best is not None and first >= best:
                return best
            for candidate in self._moments(wall, first):
                if candidate > moment and (best is None or candidate < best):
                    best = candidate
        raise AssertionError("a clock shows every time of day again")

    def _changes_about(self, moment: datetime) -> bool:
        """Whether the zone's clocks are changed a day before or after."""
        offsets = {
            each.astimezone(self.timezone).utcoffset()
            for each in (moment - _REPEATED, moment, moment + _REPEATED)
        }
        return len(offsets) > 1

    def _moments(self, wall: datetime, first: datetime) -> Iterator[datetime]:
        """When the clock on the wall shows `wall` and that counts. `first`: as PEP 495 has it for fold 0."""
        skipped = first.astimezone(self.timezone).replace(tzinfo=None) != wall
        if skipped:
            if not self.every_hour:
                yield self._end_of_gap(first)
            return
        yield first
        second = wall.replace(tzinfo=self.timezone, fold=1).astimezone(UTC)
        if self.every_hour and second != first:
            yield second

    def _end_of_gap(self, inside: datetime) -> datetime:
        """The first minute after the clock was set forward. `inside`: how PEP 495 reads a time that was
        skipped, with fold 0: by the offset of before, so as long after the gap's end as it lies in it.
        """
        offset = inside.astimezone(self.timezone).utcoffset()
        low, high = inside - _REPEATED, inside
        while high - low > _MINUTE:
            middle = low + (high - low) // (2 * _MINUTE) * _MINUTE
            if middle.astimezone(self.timezone).utcoffset() == offset:
                high = middle
            else:
                low = middle
        return high

    def _walls(self, start: datetime) -> Iterator[datetime]:
        """Every time of day that it names, from `start` on, as a clock without a time zone shows it."""
        day = start.date()
        earliest = start
        while True:
            if day.month not in self.months:
                day = date(day.year + day.month // 12, day.month % 12 + 1, 1)
                continue
            if self._is_day(day):
                for hour in self.hours:
                    for minute in self.minutes:
                        wall = datetime(day.year, day.month, day.day, hour, minute)  # noqa: DTZ001 - on the wall
                        if wall >= earliest:
                            yield wall
            day += _DAY

    def _is_day(self, day: date) -> bool:
        in_month = day.day in self.days
        in_week = (day.weekday() + 1) % 7 in self.weekdays
        if self.any_day or self.any_weekday:
            return in_month and in_week
        return in_month or in_week


def _read(expression: str, field: _Field, text: str) -> set[int]:
    """The numbers that a field names."""

    def fail(reason: str, remedy: str) -> CronError:
        return CronError(expression, field.name, text, reason, remedy)

    def number(word: str, *, is_last: bool = False) -> int:
        if word in field.names:
            value = field.names.index(word) + field.least
            return 7 if field.most == 7 and value == 0 and is_last else value
        if not word.isdecimal():
            names = f", or a name such as {field.names[1]}" if field.names else ""
            raise fail(f"{word!r} is no number", f"write numbers from {field.least} to {field.most}{names}")
        value = int(word)
        if not field.least <= value <= field.most:
            raise fail(f"{word} is out of bounds", f"write numbers from {field.least} to {field.most}")
        return value

    numbers: set[int] = set()
    for part in text.split(","):
        found = _PART.fullmatch(part)
        if found is None:
            raise fail(
                f"{part!r} cannot be read", "write numbers, ranges such as 1-5, steps such as */10, or *"
            )
        first, last, step = found["first"], found["last"], found["step"]
        if first == "*":
            if last is not None:
                raise fail("a range begins with a number", "write * alone, or two numbers")
            low, high = field.least, field.most
        else:
            low = number(first)
            high = low if last is None else number(last, is_last=True)
            if last is None and step is not None:
                raise fail("a step needs a range", f"write {first}-{field.most}/{step}, or */{step} for all")
            if high < low:
                remedy = f"write {first}-{field.most},{field.least}-{last}"
                raise fail("the range ends before it begins", remedy)
        every = 1
        if step is not None:
            if not step.isdecimal() or int(step) == 0:
                raise fail(f"{step!r} is no step", "write a whole number from 1")
            every = int(step)
        numbers.update(range(low, high + 1, every))
    return numbers
