"""A poll: asked and answered over HTTP or WebSocket, counted once, seen by all at once.

broker dev docs/examples/poll.py
"""

import re
from pathlib import Path
from secrets import token_hex
from typing import Any

from broker import Connection, ConnectionContext, Refuse, Request, Server

PAGE = Path(__file__).with_suffix(".html")


class Poll(Server):
    async def on_request(self, request: Request) -> Any:
        """PUT makes the poll, POST votes, GET looks. Whoever has no cookie is somebody new."""
        voter = voter_of(request) or token_hex(16)
        match request.method, await request.get_json(force=True, silent=True):
            case "GET" | "HEAD", _:
                pass
            case "PUT", {"question": str(question), "options": [str(), str(), *_] as options}:
                await self.make(question, options)
            case "POST", {"vote": str(option)}:
                await self.vote(voter, option)
            case _:
                raise Refuse(400, 'PUT {"question": "…", "options": ["…", "…"]} or POST {"vote": "…"}')
        return await self.seen_by(voter)

    async def on_connect(self, connection: Connection, ctx: ConnectionContext) -> None:
        """A browser sends its cookie along, so this is the same person. A script has its connection's id."""
        voter = voter_of(ctx.request) or f"connection {connection.id}"
        connection.set_state({"voter": voter})
        if await self.room.storage.get("poll"):
            connection.send(await self.seen_by(voter))

    async def on_message(self, message: str | bytes, sender: Connection) -> None:
        """A vote: the option's text."""
        try:
            await self.vote(sender.state["voter"], message)
            sender.send({"mine": message})
        except Refuse as refused:
            sender.send({"error": refused.text})

    async def make(self, question: str, options: list[Any]) -> None:
        """Keep question and options, once and for all."""
        if await self.room.storage.get("poll"):
            raise Refuse(409, "this poll is there already")
        poll = {"question": question, "votes": {str(option): 0 for option in options}}
        await self.room.storage.put("poll", poll)
        self.room.broadcast({**poll, "mine": None})

    async def vote(self, voter: str, option: str | bytes) -> None:
        """Count a vote, and note who gave it: in one turn, so both are kept or neither."""
        poll = await self.poll()
        if option not in poll["votes"]:
            raise Refuse(400, "vote for one of the options")
        if await self.room.storage.get(f"voter {voter}"):
            raise Refuse(409, "you have voted already")
        poll["votes"][option] += 1
        await self.room.storage.put({"poll": poll, f"voter {voter}": option})
        self.room.broadcast(poll)

    async def seen_by(self, voter: str) -> dict[str, Any]:
        """The poll, and the voter's own vote."""
        return {**await self.poll(), "mine": await self.room.storage.get(f"voter {voter}")}

    async def poll(self) -> dict[str, Any]:
        """Question, options, and how many are for each."""
        poll: dict[str, Any] | None = await self.room.storage.get("poll")
        if poll is None:
            raise Refuse(404, "there is no such poll")
        return poll

    @staticmethod
    def on_fetch(request: Request) -> tuple[str, dict[str, str]]:
        """The page, and with it the cookie that tells one browser from another."""
        if request.path != "/":
            raise Refuse(404, "there is no such page")
        voter = voter_of(request) or token_hex(16)
        return PAGE.read_text(), {"Set-Cookie": f"voter={voter}; Path=/; HttpOnly; SameSite=Lax"}


def voter_of(request: Request) -> str | None:
    """The voter whom the cookie names."""
    voter = request.cookies.get("voter", "")
    return voter if re.fullmatch("[0-9a-f]{32}", voter) else None
