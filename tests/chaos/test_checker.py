"""Each check of the checker, on histories of a few events: what is right passes, what is wrong is named."""

from collections import Counter

import pytest

from tests.chaos.checker import Report, check
from tests.chaos.history import Event

ROOM = "r"


class Story:
    """Writes the history of one room: each call is one event, a millisecond after the last."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.numbers: Counter[str] = Counter()

    def add(self, who, connection, sequence, event, detail=None) -> "Story":
        self.events.append(Event(len(self.events) / 1000, who, ROOM, connection, sequence, event, detail))
        return self

    def open(self, name, turn, *tags, times=1) -> "Story":
        self.add("client", name, 0, "connect", {"tags": list(tags), "plain": not times})
        self.add("client", name, 0, "open")
        return self.frame(name, "h", turn, times, list(tags)).frame(name, "g", f"token of {name}")

    def send(self, name, kind, *rest):
        self.numbers[name] += 1
        return self.add("client", name, self.numbers[name], "send", [kind, *rest])

    def frame(self, name, *frame) -> "Story":
        number = frame[1] if frame[0] in "bcefLlpstx" else 0
        return self.add("client", name, number, "frame", list(frame))

    def leave(self, name, how="close"):
        self.add("client", name, 0, "leave", how)
        return self if how == "reset" else self.add("client", name, 0, "end", ["close", 1000])

    def truth(self, turn, k=None, c=None, x=None, b=None):
        told = {"T": turn, "k": k or {}, "c": c or {}, "x": x or {}, "b": b or {}, "connected": []}
        return self.add("truth", "", 0, "truth", told)

    def attempt(self, name, number, kind, token):
        return self.add("room", name, number, kind, token)

    def check(self, *, finished: bool = True) -> Report:
        end = [Event(1e9, "client", "", "", 0, "finish")] if finished else []
        return check([*self.events, *end])

    def kinds(self) -> list[str]:
        return sorted({finding.kind for finding in self.check().findings})


def story(*tags: str) -> Story:
    """One connection whose connect turn was the first that wrote."""
    return Story().open("one", 1, *tags)


def test_a_history_without_a_fault_has_no_finding():
    told = story("a").open("two", 2, "a", "b").send("one", "c").send("one", "e").send("one", "b", "a")
    told.frame("one", "c", 1, 3, 1, 0).frame("one", "e", 2, "x", 32, 1)
    for name in ("one", "two"):
        told.frame(name, "B", 4, "one", 3, "a", "y")
    told.frame("one", "b", 3, 4, 2, 1, "y").send("one", "p", "b").send("two", "s")
    told.frame("one", "p", 4, "z").frame("two", "P", "one", 4, "b", "z").frame("two", "s", 1, 1)
    told.send("one", "f").send("two", "f")
    told.frame("two", "f", 2, 5, 1, 0).frame("one", "f", 5, 6, 3, 3).leave("one").leave("two")
    told.truth(
        8,
        k={"one": [1, 1], "two": [1, 2]},
        c={"one": [3, 5], "two": [1, 2]},
        x={"one": [[7, 1000, "client_close", 3, 5]], "two": [[8, 1000, "client_close", 1, 2]]},
        b={"000000004": ["one", 3, "a", "y"]},
    )
    report = told.check()
    assert report.findings == []
    assert report.counts["messages"] == report.counts["answers"] == 7
    assert report.counts["deliveries"] == 3
    assert report.counts["closes"] == 2


class TestAnswers:
    def test_one_that_is_passed_over_is_lost(self):
        told = story().send("one", "e").send("one", "e").frame("one", "e", 2, "x", 0, 1)
        assert told.kinds() == ["lost"]

    def test_one_that_never_comes_is_lost(self):
        assert story().send("one", "e").kinds() == ["lost"]

    def test_one_that_is_under_way_when_the_run_breaks_off_is_not(self):
        assert [each.kind for each in story().send("one", "e").check(finished=False).findings] == [
            "unfinished"
        ]

    def test_nothing_is_owed_to_who_has_left(self):
        assert story().send("one", "e").leave("one", "reset").kinds() == []

    def test_the_same_once_more_is_doubled(self):
        told = story().send("one", "e").frame("one", "e", 1, "x", 0, 1).frame("one", "e", 1, "x", 0, 1)
        assert told.kinds() == ["doubled"]

    def test_in_the_wrong_order_they_are_reordered(self):
        told = story().send("one", "e").send("one", "e")
        told.frame("one", "e", 2, "y", 0, 1).frame("one", "e", 1, "x", 0, 1)
        assert told.kinds() == ["reordered"]

    def test_before_their_message_they_are_early(self):
        told = story().frame("one", "e", 1, "x", 0, 1).send("one", "e")
        assert "early" in told.kinds()

    def test_of_another_kind_they_are_torn(self):
        assert "torn" in story().send("one", "e").frame("one", "s", 1, 1).kinds()

    def test_with_a_damaged_body_they_are_torn(self):
        assert story().send("one", "e").frame("one", "e", 1, "x", 32, 0).kinds() == ["torn"]

    def test_bytes_that_are_no_frame_are_torn(self):
        assert story().frame("one", "?", 3, "xyz").kinds() == ["torn"]


class TestConnectTurn:
    def test_a_frame_before_its_frames_is_early(self):
        told = Story().add("client", "one", 0, "connect").add("client", "one", 0, "open")
        told.frame("one", "P", "two", 1, "a", "x").frame("one", "h", 1, 1, []).frame("one", "g", "y")
        assert told.kinds() == ["early"]

    def test_a_frame_between_its_frames_is_early(self):
        told = Story().add("client", "one", 0, "connect").add("client", "one", 0, "open")
        told.frame("one", "h", 1, 1, []).frame("one", "P", "two", 1, "a", "x")
        assert told.kinds() == ["early"]

    def test_a_frame_before_the_101_is_early(self):
        told = Story().add("client", "one", 0, "connect").frame("one", "h", 1, 1, []).frame("one", "g", "y")
        assert told.kinds() == ["early"]

    def test_twice_it_is_doubled(self):
        assert story().frame("one", "h", 1, 1, []).kinds() == ["doubled"]
        assert story().frame("one", "g", "token of one").kinds() == ["doubled"]

    def test_committed_twice_it_is_doubled(self):
        assert Story().open("one", 2, times=2).kinds() == ["doubled"]
        assert story().truth(2, k={"one": [2, 2]}, x={"one": [[3, 1000, "", 0, 0]]}).kinds() == ["doubled"]


class TestTurnsThatWrite:
    def test_one_that_was_committed_twice_is_doubled(self):
        told = story().send("one", "c").send("one", "c")
        told.frame("one", "c", 1, 2, 1, 0).frame("one", "c", 2, 4, 3, 2)
        assert told.kinds() == ["doubled"]

    def test_that_is_said_once_and_not_for_each_later_answer(self):
        told = story()
        for number in range(1, 5):
            told.send("one", "c").frame("one", "c", number, number + 2, number + 1, number - 1)
        assert [finding.kind for finding in told.check().findings] == ["doubled"]

    def test_one_that_was_not_counted_is_lost(self):
        told = story().send("one", "c").send("one", "c")
        told.frame("one", "c", 1, 2, 1, 0).frame("one", "c", 2, 3, 1, 0)
        assert told.kinds() == ["lost"]

    def test_one_that_ran_before_another_is_reordered(self):
        told = story().send("one", "c").send("one", "c").send("one", "c")
        told.frame("one", "c", 1, 2, 1, 0).frame("one", "c", 2, 3, 2, 3).frame("one", "c", 3, 4, 3, 2)
        assert told.kinds() == ["reordered"]

    def test_a_number_that_two_turns_have_is_doubled(self):
        told = story().open("two", 2).send("one", "c").send("two", "c")
        assert told.frame("one", "c", 1, 3, 1, 0).frame("two", "c", 1, 3, 1, 0).kinds() == ["doubled"]

    def test_an_older_turn_after_a_newer_one_is_reordered(self):
        told = story("a").open("two", 2).send("two", "b", "a").send("one", "c").frame("one", "c", 1, 4, 1, 0)
        assert told.frame("one", "B", 3, "two", 1, "a", "x").frame("two", "b", 1, 3, 1, 0, "x").kinds() == [
            "reordered"
        ]

    def test_state_that_was_counted_twice_is_doubled_and_state_that_is_gone_is_lost(self):
        assert story().send("one", "s").frame("one", "s", 1, 2).kinds() == ["doubled"]
        told = story().send("one", "s").send("one", "s").frame("one", "s", 1, 1).frame("one", "s", 2, 1)
        assert told.kinds() == ["lost"]


class TestTokens:
    def test_effects_of_two_runs_of_a_turn_are_torn(self):
        told = (
            story("a").send("one", "p", "a").frame("one", "P", "one", 1, "a", "x").frame("one", "p", 1, "y")
        )
        assert told.kinds() == ["torn"]

    def test_an_effect_of_no_turn_is_early(self):
        told = Story().attempt("one", 0, "h", "token of one").open("one", 1).send("one", "e")
        told.frame("one", "e", 1, "x", 0, 1).attempt("one", 1, "e", "x")
        assert told.kinds() == ["early"]

    def test_an_attempt_that_was_discarded_is_no_fault(self):
        told = Story().attempt("one", 0, "h", "token of one").open("one", 1).send("one", "e")
        told.attempt("one", 1, "e", "w").attempt("one", 1, "e", "x").frame("one", "e", 1, "x", 0, 1)
        report = told.check()
        assert report.findings == []
        assert report.counts["turns run again"] == 1


class TestSockets:
    def test_one_that_ends_by_itself_is_dropped(self):
        assert story().add("client", "one", 0, "end", ["eof", 1006]).kinds() == ["dropped"]
        assert story().add("client", "one", 0, "end", ["close", 1012]).kinds() == ["dropped"]

    @pytest.mark.parametrize("how", ["close", "half"])
    def test_one_that_ends_after_its_client_left_is_not(self, how):
        assert story().leave("one", how).kinds() == []

    def test_one_that_the_room_was_asked_to_close_is_not(self):
        told = story().send("one", "x").frame("one", "x", 1, 2, 1, 0)
        assert told.add("client", "one", 0, "end", ["close", 4001]).kinds() == []

    def test_one_that_ends_before_the_answer_to_that_is_dropped(self):
        assert story().send("one", "x").add("client", "one", 0, "end", ["close", 4001]).kinds() == ["dropped"]

    def test_a_handshake_that_fails_is_counted_and_no_drop(self):
        told = Story().add("client", "one", 0, "connect").add("client", "one", 0, "refused", "eof")
        assert told.kinds() == []
        assert told.check().counts["handshakes refused"] == 1


class TestBroadcasts:
    def sent(self, *tags):
        told = story().open("two", 2, *tags).send("one", "b", "a")
        return told.frame("one", "b", 1, 3, 1, 0, "x")

    def after(self, told):
        """Something later that the listener has read, so that the broadcast is overdue."""
        return told.send("two", "f").frame("two", "f", 1, 4, 1, 0)

    def test_one_that_never_comes_is_missing(self):
        assert self.after(self.sent("a")).kinds() == ["broadcast missing"]

    def test_one_that_may_still_come_is_not(self):
        assert self.sent("a").kinds() == []

    def test_one_to_another_tag_is_not_missed(self):
        assert self.after(self.sent("b")).kinds() == []

    def test_one_that_comes_without_the_tag_is_astray(self):
        told = self.sent("b").frame("two", "B", 3, "one", 1, "a", "x")
        assert self.after(told).kinds() == ["broadcast astray"]

    def test_one_that_comes_twice_is_doubled(self):
        told = self.sent("a")
        for _ in range(2):
            told.frame("two", "B", 3, "one", 1, "a", "x")
        assert self.after(told).kinds() == ["broadcast doubled"]

    def test_tags_count_from_the_turn_that_changed_them(self):
        told = story().open("two", 2, "b").send("two", "t", ["a"]).send("one", "b", "a").send("one", "b", "b")
        told.frame("two", "t", 1, 3, 1, 0, ["a"])
        told.frame("one", "b", 1, 4, 1, 0, "x").frame("one", "b", 2, 5, 2, 1, "y")
        told.send("two", "f")
        without = Story()
        without.events, without.numbers = list(told.events), told.numbers.copy()
        assert without.frame("two", "f", 2, 6, 2, 1).kinds() == ["broadcast missing"]
        told.frame("two", "B", 4, "one", 1, "a", "x").frame("two", "f", 2, 6, 2, 1)
        assert told.kinds() == []

    def test_nothing_is_owed_after_leaving(self):
        told = self.sent("a").leave("two").frame("two", "f", 1, 9, 1, 0)
        assert "broadcast missing" not in told.kinds()

    def plain(self, *tags):
        """A broadcast of a turn that writes nothing, between turns 3 and 4 of its sender."""
        told = story().open("two", 2, *tags).send("one", "c").send("one", "p", "a").send("one", "c")
        told.frame("one", "c", 1, 3, 1, 0).frame("one", "p", 2, "x").frame("one", "c", 3, 4, 2, 1)
        return told.send("two", "f")

    def test_one_from_a_turn_that_writes_nothing_is_missed_too(self):
        assert self.plain("a").frame("two", "f", 1, 5, 1, 0).kinds() == ["broadcast missing"]
        assert self.plain("b").frame("two", "f", 1, 5, 1, 0).kinds() == []
        told = self.plain("a").frame("two", "P", "one", 2, "a", "x").frame("two", "f", 1, 5, 1, 0)
        assert told.kinds() == []

    def test_one_that_comes_after_later_turns_is_reordered(self):
        told = self.plain("a").frame("two", "f", 1, 5, 1, 0).frame("two", "P", "one", 2, "a", "x")
        assert told.kinds() == ["reordered"]

    def test_who_connected_at_about_that_time_need_not_have_it(self):
        told = story().send("one", "c").send("one", "p", "a").send("one", "c")
        told.frame("one", "c", 1, 2, 1, 0).frame("one", "p", 2, "x").frame("one", "c", 3, 3, 2, 1)
        told.open("two", 2, "a", times=0).send("two", "f").frame("two", "f", 1, 4, 1, 0)
        assert told.kinds() == []


class TestTruth:
    def close(self, count=0, last=0, times=1):
        return {"one": [[9, 1000, "client_close", count, last]] * times}

    def test_a_close_turn_that_never_ran_is_missing(self):
        assert story().leave("one").truth(1, k={"one": [1, 1]}).kinds() == ["close missing"]

    def test_a_close_turn_that_ran_twice_is_doubled(self):
        told = story().leave("one").truth(9, k={"one": [1, 1]}, x=self.close(times=2))
        assert told.kinds() == ["close doubled"]

    def test_a_connect_turn_without_a_101_that_was_read_has_its_close_turn_too(self):
        told = Story().add("client", "one", 0, "connect").add("client", "one", 0, "refused", "eof")
        assert told.truth(1, k={"one": [1, 1]}).kinds() == ["close missing"]

    def test_what_was_seen_and_is_not_stored_was_early(self):
        told = story().send("one", "c").frame("one", "c", 1, 2, 1, 0).leave("one")
        assert told.truth(9, k={"one": [1, 1]}, x=self.close()).kinds() == ["early"]

    def test_so_are_a_turn_a_broadcast_and_a_connect_turn(self):
        assert story().leave("one").truth(0, x=self.close(), k={"one": [1, 1]}).kinds() == ["early"]
        assert story().leave("one").truth(9, x=self.close()).kinds() == ["early"]
        told = story().send("one", "b", "a").frame("one", "b", 1, 2, 1, 0, "x").leave("one")
        told.truth(9, k={"one": [1, 1]}, c={"one": [1, 1]}, x=self.close(1, 1))
        assert told.kinds() == ["early"]

    def test_a_message_before_an_orderly_end_that_was_not_handled_is_lost(self):
        told = story().send("one", "c").leave("one", "half")
        assert told.truth(9, k={"one": [1, 1]}, x=self.close()).kinds() == ["lost"]

    def test_one_before_a_reset_may_be(self):
        told = story().send("one", "c").leave("one", "reset")
        assert told.truth(9, k={"one": [1, 1]}, x=self.close()).kinds() == []

    def test_but_only_from_the_end_on(self):
        told = story().send("one", "c").send("one", "c").leave("one", "reset")
        told.truth(9, k={"one": [1, 1]}, c={"one": [1, 2]}, x=self.close(1, 2))
        assert told.kinds() == ["reordered"]

    def test_more_than_was_sent_is_doubled(self):
        told = story().send("one", "c").leave("one")
        told.truth(9, k={"one": [1, 1]}, c={"one": [2, 1]}, x=self.close(2, 1))
        assert told.kinds() == ["doubled"]

    def test_a_broadcast_that_is_stored_twice_is_doubled(self):
        told = story().send("one", "b", "a").leave("one", "reset")
        stored = {"000000002": ["one", 1, "a", "x"], "000000003": ["one", 1, "a", "y"]}
        told.truth(9, k={"one": [1, 1]}, c={"one": [1, 1]}, x=self.close(1, 1), b=stored)
        assert told.kinds() == ["doubled"]

    def test_a_turn_after_the_close_turn_is_reordered(self):
        told = story().send("one", "c").leave("one")
        told.truth(9, k={"one": [1, 1]}, c={"one": [1, 1]}, x=self.close(0, 0))
        assert told.kinds() == ["reordered"]


def test_a_silence_begins_with_a_message_and_ends_with_the_answer_to_the_last():
    told = story().send("one", "e")
    told.events.append(told.events[-1]._replace(time=1.0, event="frame", detail=["P", "x", 1, "a", "t"]))
    told.events.append(told.events[-1]._replace(time=3.5, event="frame", detail=["e", 1, "t", 0, 1]))
    told.events.append(told.events[-1]._replace(time=90, event="frame", detail=["P", "x", 2, "a", "u"]))
    [silence] = told.check().silences
    assert (silence.seconds, silence.began, silence.connection) == (2.5, 1.0, "one")


def test_a_finding_is_shown_with_its_lines_and_the_kills_before():
    told = story().send("one", "e").frame("one", "e", 1, "x", 0, 0)
    told.events.insert(0, Event(0.0, "killer", "", "", 7, "kill host"))
    [finding] = told.check().findings
    assert str(finding).splitlines() == [
        "torn: r/one: the answer to message 1 is damaged",
        "    0.000000 killer  #7 kill host null",
        '    0.005000 client r/one #1 frame ["e", 1, "x", 0, 0]',
    ]
