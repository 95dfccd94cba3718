"""The history's files: what is written is read, in order, and a line that was cut off harms no other."""

import pytest

from tests.chaos.history import CLIENTS, KILLER, ROOMS, Event, Log, read, read_lines, write


def test_what_is_written_is_read_in_the_order_of_time(tmp_path):
    events = [
        Event(1.0, "client", "r", "c", 1, "send", ["e"]),
        Event(2.0, "room", "r", "c", 1, "e", "token"),
        Event(3.0, "killer", "", "", 7, "kill host"),
        Event(4.0, "client", "r", "c", 1, "frame", ["e", 1, "ä", 0, 1]),
        Event(5.0, "truth", "r", "", 0, "truth", {"T": 1}),
    ]
    write(tmp_path, reversed(events))
    assert read(tmp_path) == events
    assert {file.name for file in tmp_path.iterdir()} == {CLIENTS, ROOMS, KILLER}


def test_events_of_one_writer_at_one_time_stay_in_its_order(tmp_path):
    with Log(tmp_path / CLIENTS) as log:
        for number in range(50):
            log.raw(1.0, "client", "r", "c", number, "send", "null")
    assert [event.sequence for event in read(tmp_path)] == list(range(50))


def test_the_time_is_that_of_the_call(tmp_path):
    with Log(tmp_path / KILLER) as log:
        times = [log.add("killer", "", "", 1, "kill host") for _ in range(3)]
    assert [event.time for event in read(tmp_path)] == [pytest.approx(each, abs=1e-6) for each in times]


def test_a_line_that_was_cut_off_is_counted_and_harms_no_other(tmp_path):
    whole = '[1.0,"room","r","c",1,"e","x"]\n'
    (tmp_path / ROOMS).write_text(whole + '[2.0,"room","r"' + "\n" + whole + '[3.0,"ro')
    events, broken = read_lines(tmp_path / ROOMS)
    assert (len(events), broken) == (2, 2)
    assert read(tmp_path) == events


def test_a_damaged_file_of_somebody_who_is_not_killed_is_an_error(tmp_path):
    (tmp_path / CLIENTS).write_text("[1.0,\n")
    with pytest.raises(ValueError, match=r"1 lines .* cannot be read"):
        read(tmp_path)
