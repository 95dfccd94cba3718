"""Rate limits: who says too much has to wait, and a room in which all do takes a breath.

broker dev docs/examples/rate_limits.py
"""

from pathlib import Path
from time import time
from typing import Any

from broker import Alarm, Connection, Refuse, Request, Server

PAGE = Path(__file__).with_suffix(".html")

OWN_BURST, OWN_PER_SECOND = 5, 0.5  # messages of one connection
ROOM_BURST, ROOM_PER_SECOND = 20, 5  # messages of all of them
MUTED_SECONDS = 2
PAUSE_SECONDS = 2


class Lounge(Server):
    message_bytes_max = 1024

    async def on_message(self, message: str | bytes, sender: Connection) -> None:
        """Pass a message on if there is a token for it in the sender's bucket, and one in the room's."""
        if "muted" in sender.tags or await self.room.storage.get("paused"):
            return  # they have been told, and will be told when it is over
        own = take(sender.state, OWN_BURST, OWN_PER_SECOND)
        shared = take(await self.room.storage.get("bucket"), ROOM_BURST, ROOM_PER_SECOND)
        if own is None:
            sender.add_tags("muted")
            sender.send({"muted": MUTED_SECONDS})
            await self.room.storage.set_alarm(MUTED_SECONDS, f"muted {sender.id}", sender.id)
        elif shared is None:
            await self.room.storage.put("paused", True)
            self.room.broadcast({"paused": PAUSE_SECONDS})
            await self.room.storage.set_alarm(PAUSE_SECONDS, "paused")
        else:
            sender.set_state(own)
            await self.room.storage.put("bucket", shared)
            self.room.broadcast({"said": str(message)})

    async def on_alarm(self, alarm: Alarm) -> None:
        """It is over. The room may have slept meanwhile, or have been in a process that has died."""
        if alarm.name == "paused":
            await self.room.storage.delete("paused")
            self.room.broadcast({"paused": 0})
        elif connection := await self.room.get_connection(alarm.payload):
            connection.remove_tags("muted")
            connection.send({"muted": 0})

    async def on_close(self, connection: Connection) -> None:
        await self.room.storage.delete_alarm(f"muted {connection.id}")

    @staticmethod
    def on_fetch(request: Request) -> str:
        if request.path != "/":
            raise Refuse(404, "there is no such page")
        return PAGE.read_text()


def take(bucket: Any, burst: float, per_second: float) -> list[float] | None:
    """Take a token out of a bucket; None if there is none.

    A bucket is how many tokens there were, and when. It fills by itself: how far, is reckoned when somebody
    looks. One that nobody has seen yet is full.
    """
    now = time()
    tokens, then = bucket or (burst, now)
    tokens = min(burst, tokens + max(0.0, now - then) * per_second)
    return [tokens - 1, now] if tokens >= 1 else None
