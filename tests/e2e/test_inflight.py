"""Bounds on what of a room is with its host (S24): whatever ends, what had to wait for it goes on."""

import pytest

from tests.e2e.raw_client import CLOSE, TEXT

pytestmark = pytest.mark.e2e

APP = """
    import trio
    from broker import Server

    class Main(Server):
        async def on_connect(self, connection):
            if connection.id == "slow":
                await trio.sleep(0.3)

        def on_message(self, message, sender):
            sender.send(message)

        async def on_close(self, connection):
            if connection.id == "slow":
                await trio.sleep(0.3)
"""


@pytest.fixture(scope="module")
def one_event(module_broker):
    """A broker that gives a room's host one event at a time."""
    return module_broker(APP, room_inflight_events_max=1)


def test_a_message_that_waits_for_a_connect_turn_comes_after_it(one_event):
    """S24: the room's bound counts connect turns; the message is read when that turn is acknowledged."""
    with one_event.connect("/party/a") as first, one_event.connect("/party/a?_pk=slow"):
        first.send_frame(TEXT, b"waits")
        assert first.receive_frame() == (TEXT, b"waits")


def test_a_message_that_waits_for_a_close_turn_comes_after_it(one_event):
    """S24: and so it does after a close turn."""
    with one_event.connect("/party/b") as first, one_event.connect("/party/b?_pk=slow") as second:
        first.send_frame(TEXT, b"both are open")
        assert first.receive_frame() == (TEXT, b"both are open")
        second.send_frame(CLOSE, b"\x03\xe8")
        assert second.receive_frame()[0] == CLOSE
        first.send_frame(TEXT, b"waits")
        assert first.receive_frame() == (TEXT, b"waits")
