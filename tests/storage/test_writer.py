"""The writer thread: order, numbers, errors, its eventfd."""

import functools
import gc
import os
import select
import threading
import weakref

import pytest

from storage.writer import Writer


@pytest.fixture
def writer():
    writer = Writer("test writer")
    yield writer
    writer.close()


def wait(writer, count, deadline_seconds=20):
    """Collect `count` completions, by waiting on the descriptor as a loop does."""
    poll = select.poll()
    poll.register(writer.fd, select.POLLIN)
    finished: list = []
    while len(finished) < count:
        assert poll.poll(deadline_seconds * 1000), "no completion came"
        finished += writer.completed()
    return finished


def readable(writer):
    return bool(select.select([writer.fd], [], [], 0)[0])


def test_jobs_run_in_order_on_one_other_thread_and_are_numbered_from_one(writer):
    ran = []
    numbers = [writer.submit(lambda i=i: ran.append((i, threading.current_thread().name))) for i in range(50)]
    assert numbers == list(range(1, 51))
    assert wait(writer, 50) == [(number, None) for number in numbers]
    assert ran == [(i, "test writer") for i in range(50)]
    assert threading.current_thread().name != "test writer"


def test_errors_come_back_with_their_number_and_stop_nothing(writer):
    error = SystemExit(3)

    def fail():
        raise error

    writer.submit(lambda: None)
    writer.submit(fail)
    writer.submit(lambda: None)
    assert wait(writer, 3) == [(1, None), (2, error), (3, None)]


def test_completed_never_waits_and_drains_the_descriptor(writer):
    assert writer.completed() == []
    assert not readable(writer)
    for _ in range(200):
        writer.submit(lambda: None)
        assert len(wait(writer, 1)) == 1
    gate = threading.Event()
    writer.submit(gate.wait)
    assert writer.completed() == []
    assert not readable(writer)
    assert writer.pending == 1
    gate.set()
    wait(writer, 1)
    assert not readable(writer)
    assert writer.pending == 0


def test_a_burst_of_completions_is_all_taken_and_leaves_the_descriptor_quiet(writer):
    total = 5000
    for _ in range(total):
        writer.submit(int)
    assert [number for number, _ in wait(writer, total)] == list(range(1, total + 1))
    # A signal may still be on its way for what has been taken: it has come when the next job runs.
    begun, gate = threading.Event(), threading.Event()

    def block():
        begun.set()
        gate.wait()

    writer.submit(block)
    assert begun.wait(20)
    assert writer.completed() == []
    assert not readable(writer)
    gate.set()
    wait(writer, 1)
    assert not readable(writer)


def test_close_finishes_what_is_queued_and_can_be_repeated():
    writer = Writer("closing")
    descriptor = writer.fd
    ran: list[int] = []
    gate = threading.Event()
    writer.submit(gate.wait)
    for i in range(10):
        writer.submit(functools.partial(ran.append, i))
    gate.set()
    writer.close()
    writer.close()
    assert ran == list(range(10))
    assert len(writer.completed()) == 11
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    with pytest.raises(RuntimeError):
        writer.submit(int)
    assert not any(thread.name == "closing" for thread in threading.enumerate())


def test_a_finished_job_is_not_kept_until_the_next_one(writer):
    class Payload:
        def __call__(self):
            return None

    payload = Payload()
    gone = weakref.ref(payload)
    writer.submit(payload)
    wait(writer, 1)
    del payload
    gc.collect()
    assert gone() is None


def test_the_descriptor_is_not_inherited(writer):
    assert not os.get_inheritable(writer.fd)
