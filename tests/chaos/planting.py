"""Faults put into a copy of a history, to see whether the checker finds them.

Owns one planter for each kind of fault: it looks for a place in a room's events where the fault shows, and
gives a changed copy. A run counts only when each kind, planted into its own history, was found
(`prove_checker`): a checker that looks away would report every run as clean. Pure. Peer: `checker`.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from tests.chaos.checker import DURABLE, REPLIES, Finding, check_room, split
from tests.chaos.history import Event

__all__ = ["PLANTERS", "plant", "prove_checker"]

Events = list[Event]
Planter = Callable[[Events, random.Random], Events | None]


def _by_connection(events: Events) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, event in enumerate(events):
        if event.who == "client":
            found.setdefault(event.connection, []).append(index)
    return found


def _stretches(events: Events, chance: random.Random) -> Iterator[list[int]]:
    """For each connection, in random order, the places of its events before it left."""
    stretches = list(_by_connection(events).values())
    chance.shuffle(stretches)
    for places in stretches:
        until = next(
            (at for at, place in enumerate(places) if events[place].event in ("leave", "end")), len(places)
        )
        yield places[:until]


def _frames(events: Events, places: Iterable[int], kinds: Iterable[str]) -> list[int]:
    return [at for at in places if events[at].event == "frame" and events[at].detail[0] in kinds]


def _without(events: Events, place: int) -> Events:
    return [*events[:place], *events[place + 1 :]]


def _with(events: Events, place: int, *fresh: Event) -> Events:
    return [*events[:place], *fresh, *events[place:]]


def _swapped(events: Events, first: int, second: int) -> Events:
    """Two frames exchange their places; the times stay where they are."""
    copy = list(events)
    copy[first] = events[first]._replace(detail=events[second].detail, sequence=events[second].sequence)
    copy[second] = events[second]._replace(detail=events[first].detail, sequence=events[first].sequence)
    return copy


def _truth(events: Events) -> int | None:
    return next((at for at in range(len(events) - 1, -1, -1) if events[at].who == "truth"), None)


def _lost(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        replies = _frames(events, places, REPLIES - {"t"})
        if len(replies) > 1:
            return _without(events, chance.choice(replies[:-1]))
    return None


def _doubled(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        replies = _frames(events, places, REPLIES)
        if replies:
            place = chance.choice(replies)
            return _with(events, place + 1, events[place])
    return None


def _committed_twice(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        counted = _frames(events, places, DURABLE)
        if len(counted) > 1:
            start = chance.choice(counted[1:])
            copy = list(events)
            for place in counted:
                if place >= start:
                    kind, number, turn, count, *rest = events[place].detail
                    copy[place] = events[place]._replace(detail=[kind, number, turn, count + 1, *rest])
            return copy
    return None


def _reordered(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        replies = _frames(events, places, "eLlp")
        sent = {events[at].sequence: at for at in places if events[at].event == "send"}
        # Both were under way: otherwise the answer would come before its message.
        pairs = [
            (one, two)
            for one, two in pairwise(replies)
            if events[two].detail[1] == events[one].detail[1] + 1 and sent[events[two].detail[1]] < one
        ]
        if pairs:
            return _swapped(events, *chance.choice(pairs))
    return None


def _broadcasts_reordered(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        came = _frames(events, places, "B")
        if len(came) > 1:
            at = chance.randrange(len(came) - 1)
            return _swapped(events, came[at], came[at + 1])
    return None


def _early(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        replies = _frames(events, places, REPLIES)
        if replies:
            place = chance.choice(replies)
            number = events[place].detail[1]
            [sent] = [at for at in places if events[at].event == "send" and events[at].sequence == number]
            return _with(_without(events, place), sent, events[place]._replace(time=events[sent].time - 1e-6))
    return None


def _before_hello(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        frames = [at for at in places if events[at].event == "frame"]
        if len(frames) > 2:
            return _swapped(events, frames[0], frames[2])
    return None


def _not_stored(events: Events, chance: random.Random) -> Events | None:
    place = _truth(events)
    if place is None:
        return None
    told = events[place].detail
    seen = {events[at].connection for at in _frames(events, range(len(events)), DURABLE)}
    counted = sorted(name for name in told["c"] if name in seen)
    if not counted:
        return None
    name = chance.choice(counted)
    # Less than the client has seen, not than it could have seen.
    most = max(
        events[at].detail[3]
        for at in _frames(events, range(len(events)), DURABLE)
        if events[at].connection == name
    )
    copy = list(events)
    copy[place] = events[place]._replace(detail={**told, "c": {**told["c"], name: [most - 1, 0]}})
    return copy


def _dropped(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        if _frames(events, places, "g"):
            last = events[places[-1]]
            if last.event != "send" or last.detail[0] != "x":
                return _with(events, places[-1] + 1, last._replace(event="end", detail=["eof", 1006]))
    return None


def _torn(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        frames = _frames(events, places, "eL")
        if frames:
            place = chance.choice(frames)
            copy = list(events)
            copy[place] = events[place]._replace(detail=[*events[place].detail[:-1], 0])
            return copy
    return None


def _two_runs(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        mine = events[places[0]].connection if places else ""
        others = [at for at in _frames(events, places, "P") if events[at].detail[1] != mine]
        for place in others:
            _, origin, number, _, token = events[place].detail
            for at in _frames(events, range(len(events)), "pP"):
                event = events[at]
                same = event.detail[0] == "P" and event.detail[1:3] == [origin, number]
                reply = event.detail[0] == "p" and (event.connection, event.detail[1]) == (origin, number)
                if at != place and (same or reply):
                    copy = list(events)
                    copy[place] = events[place]._replace(
                        detail=[*events[place].detail[:-1], token[::-1] + "0"]
                    )
                    return copy
    return None


def _close_missing(events: Events, chance: random.Random) -> Events | None:
    return _closes(events, chance, lambda closes: [])


def _close_doubled(events: Events, chance: random.Random) -> Events | None:
    return _closes(events, chance, lambda closes: closes * 2)


def _closes(events: Events, chance: random.Random, change: Callable[[list], list]) -> Events | None:
    place = _truth(events)
    if place is None:
        return None
    told = events[place].detail
    opened = {event.connection for event in events if event.event == "open"}
    names = sorted(name for name, closes in told["x"].items() if len(closes) == 1 and name in opened)
    if not names:
        return None
    name = chance.choice(names)
    copy = list(events)
    copy[place] = events[place]._replace(detail={**told, "x": {**told["x"], name: change(told["x"][name])}})
    return copy


def _broadcast_missing(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        turns = _frames(events, places, DURABLE | {"B"})
        came = [at for at in _frames(events, places, "B") if turns and at < turns[-1]]
        if came:
            return _without(events, chance.choice(came))
    return None


def _plain_missing(events: Events, chance: random.Random) -> Events | None:
    """One's own broadcast between two turns of one's own that wrote: there the place is known."""
    for places in _stretches(events, chance):
        name = events[places[0]].connection if places else ""
        counted = _frames(events, places, DURABLE)
        own = [
            at
            for at in _frames(events, places, "P")
            if events[at].detail[1] == name and counted and counted[0] < at < counted[-1]
        ]
        if own and not _frames(events, places, "t"):
            return _without(events, chance.choice(own))
    return None


def _broadcast_doubled(events: Events, chance: random.Random) -> Events | None:
    for places in _stretches(events, chance):
        came = _frames(events, places, "BP")
        if came:
            place = chance.choice(came)
            return _with(events, place + 1, events[place])
    return None


#: Each planted fault: what the checker has to call it, and how it is planted.
PLANTERS: dict[str, tuple[str, Planter]] = {
    "an answer is lost": ("lost", _lost),
    "an answer comes twice": ("doubled", _doubled),
    "a turn is committed twice": ("doubled", _committed_twice),
    "two answers are swapped": ("reordered", _reordered),
    "two broadcasts are swapped": ("reordered", _broadcasts_reordered),
    "an answer comes before its message": ("early", _early),
    "a frame comes before the connect turn's": ("early", _before_hello),
    "an answer comes before its turn is stored": ("early", _not_stored),
    "a socket ends by itself": ("dropped", _dropped),
    "a frame is torn": ("torn", _torn),
    "two runs of a turn are seen": ("torn", _two_runs),
    "on_close never runs": ("close missing", _close_missing),
    "on_close runs twice": ("close doubled", _close_doubled),
    "a broadcast misses one": ("broadcast missing", _broadcast_missing),
    "a broadcast of a turn that writes nothing misses one": ("broadcast missing", _plain_missing),
    "a broadcast reaches one twice": ("broadcast doubled", _broadcast_doubled),
}


def plant(events: Events, fault: str, seed: int) -> Events | None:
    """Give a copy of a room's events with one fault in it; None where this room has no place for it."""
    return PLANTERS[fault][1](events, random.Random(f"{fault} {seed}"))


def prove_checker(events: Iterable[Event], seed: int, tries: int = 40) -> list[str]:
    """Plant each kind of fault into a copy of a room of this history, and have the checker find it.

    Returns what is wrong, in words: a fault that was not found, or that found no place in the whole history.
    """
    rooms, kills, finished = split(events)
    chance = random.Random(seed)
    before: dict[str, set[Finding]] = {}
    wrong: list[str] = []
    for fault, (kind, _) in PLANTERS.items():
        planted = None
        for name in chance.sample(sorted(rooms), min(tries, len(rooms))):
            planted = plant(rooms[name], fault, seed)
            if planted is None:
                continue
            if name not in before:
                before[name] = set(check_room(name, rooms[name], kills, finished=finished).findings)
            after = set(check_room(name, planted, kills, finished=True).findings)
            if not any(finding.kind == kind for finding in after - before[name]):
                wrong.append(f"planted and not found: {fault} (in room {name}, seed {seed})")
            break
        if planted is None:
            wrong.append(f"no place in this history to plant: {fault}")
    return wrong
