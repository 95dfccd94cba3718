"""Presence and cursors: everybody sees who is here, and where their pointer is.

broker dev docs/examples/presence.py
"""

import struct
from pathlib import Path
from time import time
from typing import Any

from broker import Connection, ConnectionContext, Refuse, Request, Server

PAGE = Path(__file__).with_suffix(".html")
MOVES_PER_SECOND = 40

MOVE = struct.Struct(">HH")  # from a client: x and y, as parts of 65,535
MOVED = struct.Struct(">IHH")  # to the others: whose pointer, x, y


class Presence(Server):
    message_bytes_max = 64
    slow_consumer = "drop_oldest"  # an old place is worth nothing: who reads slowly may miss it

    async def on_connect(self, connection: Connection, ctx: ConnectionContext) -> None:
        """Give the newcomer a number, tell them who is here, and tell the others."""
        number = await self.room.storage.get("numbers", 0) + 1
        await self.room.storage.put("numbers", number)
        name = ctx.request.args.get("name", "")[:24] or f"Guest {number}"
        others = [person(each) async for each in self.room.get_connections() if each.state]
        connection.set_state({"number": number, "name": name, "at": None, "second": 0, "moves": 0})
        connection.send({"you": number, "people": [*others, person(connection)]})
        self.room.broadcast({"joined": person(connection)}, without=[connection])

    def on_message(self, message: str | bytes, sender: Connection) -> None:
        """Remember where a pointer is, and tell the others, if that is not too often."""
        if not isinstance(message, bytes) or len(message) != MOVE.size:
            sender.close(1003, "four bytes, please")
            return
        x, y = MOVE.unpack(message)
        state, second = sender.state, int(time())
        moves = state["moves"] + 1 if state["second"] == second else 1
        sender.set_state({**state, "at": [x, y], "second": second, "moves": moves})
        if moves <= MOVES_PER_SECOND:
            self.room.broadcast(MOVED.pack(state["number"], x, y), without=[sender])

    def on_close(self, connection: Connection) -> None:
        """Tell the others. This comes once for every connection, however it ended."""
        if connection.state:  # none if `on_connect` failed
            self.room.broadcast({"left": connection.state["number"]})

    @staticmethod
    def on_fetch(request: Request) -> str:
        if request.path != "/":
            raise Refuse(404, "there is no such page")
        return PAGE.read_text()


def person(connection: Connection) -> dict[str, Any]:
    """What others may know of a connection."""
    return {key: connection.state[key] for key in ("number", "name", "at")}
