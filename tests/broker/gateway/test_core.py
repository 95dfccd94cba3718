"""The gateway as a whole, in the kit: what it waits for at its end."""

import pytest
import trio

from broker import Server
from broker.testing import AsyncKit, virtual

#: An order of magnitude more than anything here takes.
DRAIN_SECONDS = 600


@virtual
@pytest.mark.parametrize("answers", [True, False])
async def test_at_a_stop_a_client_of_a_room_in_quarantine_has_the_time_for_its_close(answers: bool) -> None:
    """S4, S14: what is kept for the next start is the close turn, not the Close."""
    log = []

    class Main(Server):
        def on_close(self, connection):
            log.append(connection.close_cause)

    async def drain() -> None:
        await gateway._drain()
        log.append("drained")

    async with AsyncKit(Main, drain=DRAIN_SECONDS, close_timeout_seconds=60) as kit:
        anna = await kit.connect("broken", id="anna")
        gateway = kit._machine.gateway
        gateway.quarantine.put("main/broken", "no", 0.0, 0)
        anna.stop_reading()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await kit.advance(50)
            assert log == []
            if answers:
                anna.read_on()
            else:
                await kit.advance(20)
        assert sorted(log) == ["drained", "server_close"]
