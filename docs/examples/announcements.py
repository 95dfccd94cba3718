"""Announcements of a railway station: everybody hears what concerns them, and nothing else.

broker dev docs/examples/announcements.py
"""

import json
from pathlib import Path
from typing import Any

from broker import Connection, ConnectionContext, Refuse, Request, Server

PAGE = Path(__file__).with_suffix(".html")
TOPICS = ("red line", "blue line", "step-free", "bicycles")


class Station(Server):
    def get_connection_tags(self, _: Connection, ctx: ConnectionContext) -> list[str]:
        """A traveller comes in with topics in the address: `?topic=red+line&topic=bicycles`."""
        return known(ctx.request.args.getlist("topic"))

    def on_connect(self, connection: Connection) -> None:
        connection.send({"topics": list(connection.tags)})

    def on_message(self, message: str | bytes, sender: Connection) -> None:
        """A traveller chooses other topics: `["blue line"]`."""
        sender.remove_tags(*sender.tags)
        sender.add_tags(*known(json.loads(message)))
        sender.send({"topics": list(sender.tags)})

    async def on_request(self, request: Request) -> dict[str, int]:
        """The staff announces: `{"text": "…", "all_of": […], "any_of": […], "none_of": […]}`."""
        if request.method != "POST":
            raise Refuse(405, "POST an announcement")
        match await request.get_json(force=True):
            case {"text": str(text), **rest}:
                names = ("all_of", "any_of", "none_of")
                filters: dict[str, Any] = {name: checked(rest.get(name, [])) for name in names}
            case _:
                raise Refuse(400, "an announcement has a text")
        self.room.broadcast({"text": text}, **filters)
        return {"listeners": await self.room.count_connections(**filters)}

    @staticmethod
    def on_fetch(request: Request) -> str:
        if request.path != "/":
            raise Refuse(404, "there is no such page")
        return PAGE.read_text()


def known(wanted: list[Any]) -> list[str]:
    """What a traveller may follow, of what they ask for."""
    return [topic for topic in TOPICS if topic in wanted]


def checked(topics: Any) -> list[str]:
    """What the staff filters by. A misspelt topic must not widen the circle, so it is refused."""
    if isinstance(topics, list) and all(topic in TOPICS for topic in topics):
        return topics
    raise Refuse(400, f"choose from {', '.join(TOPICS)}")
