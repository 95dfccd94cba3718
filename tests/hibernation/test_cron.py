"""Cron expressions against a clock that is looked at each minute (S31)."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hibernation.cron import CronError, Schedule

BERLIN = ZoneInfo("Europe/Berlin")
NEW_YORK = ZoneInfo("America/New_York")
LORD_HOWE = ZoneInfo("Australia/Lord_Howe")  # half an hour
KOLKATA = ZoneInfo("Asia/Kolkata")  # no changes, and no whole hours
MINUTE = timedelta(minutes=1)


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


# --- The model: one minute after the other ------------------------------------------------------------


def is_named(text: str, value: int, least: int, most: int) -> bool:
    """Whether a field, written with numbers alone, names a value."""
    for part in text.split(","):
        span, _, step = part.partition("/")
        low, _, high = span.partition("-")
        first, last = (least, most) if span == "*" else (int(low), int(high or low))
        if first <= value <= last and (value - first) % int(step or 1) == 0:
            return True
    return False


def shows(expression: str, wall: datetime) -> bool:
    """Whether a clock on the wall that shows this is meant."""
    minute, hour, day, month, weekday = expression.split()
    in_month = is_named(day, wall.day, 1, 31)
    in_week = any(is_named(weekday, n, 0, 7) for n in {wall.isoweekday() % 7, wall.isoweekday()})
    days = in_month and in_week if day[0] == "*" or weekday[0] == "*" else in_month or in_week
    return (
        is_named(minute, wall.minute, 0, 59)
        and is_named(hour, wall.hour, 0, 23)
        and is_named(month, wall.month, 1, 12)
        and days
    )


def minutes(expression: str, zone: ZoneInfo, start: datetime, end: datetime) -> Iterator[datetime]:
    """When it is due after `start`, up to `end`, found by looking at the clock each minute."""
    each_hour = all(is_named(expression.split()[1], hour, 0, 23) for hour in range(24))
    moment = (start - timedelta(hours=3)).replace(second=0, microsecond=0)
    before = moment.astimezone(zone).replace(tzinfo=None) - MINUTE
    shown: set[datetime] = set()
    while moment <= end:
        wall = moment.astimezone(zone).replace(tzinfo=None)
        skipped = [before + n * MINUTE for n in range(1, (wall - before) // MINUTE)]
        due = shows(expression, wall) and (each_hour or wall not in shown)
        due = due or (not each_hour and any(shows(expression, each) for each in skipped))
        if due and moment > start:
            yield moment
        shown.add(wall)
        before = wall
        moment += MINUTE


def part(least: int, most: int) -> st.SearchStrategy[str]:
    number = st.integers(least, most)
    span = st.tuples(number, number).map(lambda pair: f"{min(pair)}-{max(pair)}")
    step = st.integers(1, most)
    return st.one_of(
        st.just("*"), number.map(str), span, st.builds("{}/{}".format, st.one_of(span, st.just("*")), step)
    )


def fields(least: int, most: int) -> st.SearchStrategy[str]:
    return st.lists(part(least, most), min_size=1, max_size=3).map(",".join)


expressions = st.builds(
    "{} {} {} {} {}".format, fields(0, 59), fields(0, 23), fields(1, 31), fields(1, 12), fields(0, 7)
)
#: About the hours in which clocks change, and others.
starts = st.sampled_from(
    [
        utc(2026, 3, 28, 22),  # Berlin, forward
        utc(2026, 10, 24, 22),  # and back
        utc(2026, 3, 8, 4),  # New York
        utc(2026, 11, 1, 3),
        utc(2026, 4, 4, 12),  # Lord Howe
        utc(2026, 10, 3, 12),
        utc(2028, 2, 28, 20),
    ]
)
zones = st.sampled_from([UTC, BERLIN, NEW_YORK, LORD_HOWE, KOLKATA])


@settings(max_examples=60, deadline=None)
@given(expressions, starts, st.integers(0, 4 * 3600), zones)
def test_it_is_due_when_a_clock_that_is_looked_at_each_minute_shows_it(expression, start, offset, zone):
    try:
        schedule = Schedule.parse(expression, zone)
    except CronError as error:
        assert error.field == "day of the month"
        assume(False)
    moment = start + timedelta(seconds=offset)
    end = start + timedelta(hours=30)
    expected = list(islice(minutes(expression, zone, moment, end), 12))
    found: list[datetime] = []
    while len(found) < 12 and (moment := schedule.next_after(moment)) <= end:
        found.append(moment)
    assert found == expected


# --- What clocks do -----------------------------------------------------------------------------------


def after(expression: str, start: datetime, count: int, zone: ZoneInfo = BERLIN) -> list[str]:
    schedule = Schedule.parse(expression, zone)
    found = []
    for _ in range(count):
        start = schedule.next_after(start)
        found.append(start.astimezone(zone).strftime("%d. %H:%M%z"))
    return found


def test_a_time_that_the_clock_skips_is_due_when_it_has_skipped():
    """29 March 2026, Berlin: after 1:59 comes 3:00."""
    start = utc(2026, 3, 28, 12)
    assert after("30 2 * * *", start, 2) == ["29. 03:00+0200", "30. 02:30+0200"]
    assert after("15,45 2,3 * * *", start, 3) == ["29. 03:00+0200", "29. 03:15+0200", "29. 03:45+0200"]
    assert after("30 * * * *", utc(2026, 3, 29, 0), 2) == ["29. 01:30+0100", "29. 03:30+0200"]


def test_a_time_that_comes_twice_is_due_once_unless_every_hour_counts():
    """25 October 2026, Berlin: after 2:59 comes 2:00."""
    start = utc(2026, 10, 24, 12)
    assert after("30 2 * * *", start, 2) == ["25. 02:30+0200", "26. 02:30+0100"]
    start = utc(2026, 10, 25, 0)
    assert after("30 * * * *", start, 3) == ["25. 02:30+0200", "25. 02:30+0100", "25. 03:30+0100"]


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("@hourly", utc(2026, 1, 31, 13)),
        ("@daily", utc(2026, 2, 1)),
        ("@midnight", utc(2026, 2, 1)),
        ("@weekly", utc(2026, 2, 1)),
        ("@monthly", utc(2026, 2, 1)),
        ("@YEARLY", utc(2027, 1, 1)),
        ("@annually", utc(2027, 1, 1)),
        ("  30  12 * * *  ", utc(2026, 2, 1, 12, 30)),
        ("31 12 * * *", utc(2026, 1, 31, 12, 31)),
        ("0 0 29 2 *", utc(2028, 2, 29)),
        ("0 0 29 feb *", utc(2028, 2, 29)),
        ("0 9 * * mon-fri", utc(2026, 2, 2, 9)),
        ("0 9 * * FRI-SUN", utc(2026, 2, 1, 9)),
        ("0 9 * * sun-mon", utc(2026, 2, 1, 9)),
        ("0 0 13 * 5", utc(2026, 2, 6)),  # either is enough
        ("0 0 */13 * 5", utc(2026, 2, 27)),  # a field that begins with * is not restricted
    ],
)
def test_what_expressions_say(expression, expected):
    """From Saturday 31 January 2026, 12:30:20, on."""
    assert Schedule.parse(expression).next_after(utc(2026, 1, 31, 12, 30, 20)) == expected


def test_the_same_minute_is_never_due_again():
    schedule = Schedule.parse("* * * * *")
    assert schedule.next_after(utc(2026, 1, 1)) == utc(2026, 1, 1, 0, 1)
    assert schedule.next_after(utc(2026, 1, 1) - timedelta(microseconds=1)) == utc(2026, 1, 1)


@pytest.mark.parametrize(
    ("expression", "field", "text"),
    [
        ("* * * *", "", "it has 4 fields, not 5"),
        ("0 * * * * *", "", "it has 6 fields, not 5"),
        ("@reboot", "", "write one of @yearly"),
        ("60 * * * *", "minute", "60 is out of bounds; write numbers from 0 to 59"),
        ("* 24 * * *", "hour", "24 is out of bounds"),
        ("* * 0 * *", "day of the month", "0 is out of bounds"),
        ("* * 32 * *", "day of the month", "32 is out of bounds"),
        ("* * * 13 *", "month", "13 is out of bounds"),
        ("* * * 0 *", "month", "0 is out of bounds"),
        ("* * * * 8", "day of the week", "8 is out of bounds"),
        ("* * * foo *", "month", "'foo' is no number; write numbers from 1 to 12, or a name such as feb"),
        ("mon * * * *", "minute", "'mon' is no number"),
        ("*/0 * * * *", "minute", "'0' is no step"),
        ("*/x * * * *", "minute", "'x' is no step"),
        ("5/15 * * * *", "minute", "a step needs a range; write 5-59/15, or */15 for all"),
        ("* 22-2 * * *", "hour", "the range ends before it begins; write 22-23,0-2"),
        ("*-5 * * * *", "minute", "a range begins with a number"),
        ("1,,2 * * * *", "minute", "'' cannot be read"),
        ("1- * * * *", "minute", "'1-' cannot be read"),
        ("-1 * * * *", "minute", "'-1' cannot be read"),
        ("* * L * *", "day of the month", "'l' is no number"),
        ("* * ? * *", "day of the month", "'?' cannot be read"),
        ("* * * * 5#2", "day of the week", "'5#2' cannot be read"),
        ("٣ * * * *", "minute", "cannot be read"),
        ("0 0 31 feb,apr *", "day of the month", "none of these months has such a day"),
        ("0 0 30 2 */2", "day of the month", "never due"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_field_and_the_remedy(expression, field, text):
    with pytest.raises(CronError) as caught:
        Schedule.parse(expression)
    assert (caught.value.field, caught.value.expression) == (field, expression)
    assert text in str(caught.value)
    assert repr(expression) in str(caught.value)


def test_a_day_that_no_month_has_may_stand_beside_a_weekday():
    assert Schedule.parse("0 0 31 feb mon").next_after(utc(2026, 1, 1)) == utc(2026, 2, 2)
