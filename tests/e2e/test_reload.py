"""New room code on save: what becomes of connections and events that the new code does not know (S32)."""

import pytest

from tests.e2e.broker_process import eventually
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import RawClient

pytestmark = pytest.mark.e2e

OLD = """
    from broker import Server

    class Main(Server):
        def on_message(self, message, sender):
            sender.send("old " + message)

    class Leaving(Server):
        def on_connect(self, connection):
            pass

        def on_message(self, message, sender):
            sender.send("here " + message)

        def on_close(self, connection):
            pass
"""
NEW = OLD[: OLD.index("    class Leaving")].replace("old", "new")


def answers(client: RawClient, expected: str) -> bool:
    client.send("x")
    return client.receive() == expected + " x"


def test_connections_stay_when_their_party_leaves_the_code(broker: BrokerFactory) -> None:
    """S32: a host never hears of a party that it does not know, and the party can come back."""
    process = broker(OLD, command="dev")
    with (
        process.connect() as main,
        process.connect("/parties/leaving/a") as stays,
        process.connect("/parties/leaving/a") as goes,
    ):
        assert answers(stays, "here")
        process.write_app(NEW)
        eventually(lambda: answers(main, "new"))
        hosts = process.host_pids()
        stays.send("lost")
        goes.send("lost")
        goes.close()
        eventually(lambda: process.stats()["connections"] == 2)
        eventually(lambda: not process.unread_bytes(stays.local_port), "the end of what is lost")
        assert answers(main, "new")
        assert process.host_pids() == hosts
        process.write_app(OLD)
        eventually(lambda: answers(main, "old"))
        assert answers(stays, "here")
