"""The chat of `broker demo`, to look at and to learn from: rooms, names, flags, and a page that shows when a
room's code is in memory. Change it while people chat, "came in" below for instance, and save: nobody is
dropped.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from time import monotonic, time
from typing import Any

from broker import Connection, ConnectionContext, Refuse, Request, Response, Server

HISTORY_MESSAGES = 50
TEXT_CHARACTERS, NAME_CHARACTERS = 1000, 24
BURST_MESSAGES, BURST_SECONDS = 8, 5.0


class Chat(Server):
    """One room of the chat: there is an object of this class only while there is something for it to do."""

    idle_seconds = 1.5  # it would sleep at once; like this, a person can see it wake and fall asleep
    message_bytes_max = 8192  # who sends more is disconnected, before the room hears of it

    def on_start(self) -> None:
        """Run at each waking. Fields are gone when the room sleeps: right for this one, since a flood keeps
        the room awake. What has to last is in `self.room.storage`, or in a connection's state and tags.
        """
        self.spoken: defaultdict[str, list[float]] = defaultdict(list)

    def get_connection_tags(self, _: Connection, ctx: ConnectionContext) -> list[str]:
        """Tags make groups within the room: each connection has its country for one, such as "fr"."""
        return [country(ctx.request.args.get("flag", ""))]

    async def on_connect(self, connection: Connection, ctx: ConnectionContext) -> None:
        """Greet the newcomer with what there is to know, and tell the others. State stays with the connection
        while the room sleeps.
        """
        connection.set_state({"name": short(ctx.request.args.get("name", ""))})
        history = await self.room.storage.get("history", [])
        newcomer = person(connection)
        connection.send(
            {
                "type": "welcome",
                "you": connection.id,
                # One that is coming in at the same time has no state yet: it will tell of itself.
                "people": [person(each) async for each in self.room.get_connections() if each.state],
                "history": [said for said in history if said["to"] in (None, newcomer["flag"])],
            }
        )
        line = f"{newcomer['name']} came in"
        self.room.broadcast({"type": "joined", "person": newcomer, "line": line}, without=[connection])

    async def on_message(self, message: str | bytes, sender: Connection) -> None:
        """Do what a page asks for. Whatever else somebody sends gets one line in answer, and no more."""
        if self.too_fast(sender):
            sender.send({"type": "notice", "line": "Slowly, please: that one was not sent."})
            return
        match parse(message):
            case {"say": str(text), "to": str() | None as to} if text.strip():
                await self.say(sender, clean(text, TEXT_CHARACTERS), None if to is None else country(to))
            case {"name": str(name), "flag": str(flag)}:
                before = person(sender)["name"]
                sender.set_state({"name": short(name)})
                sender.remove_tags(*sender.tags)
                sender.add_tags(country(flag))
                now = person(sender)
                line = f"{before} is {now['name']} now" if before != now["name"] else None
                self.room.broadcast({"type": "changed", "person": now, "line": line})
            case _:
                sender.send({"type": "notice", "line": "This chat does not know what that means."})

    async def say(self, sender: Connection, text: str, to: str | None) -> None:
        """Keep a message, and send it to everybody, or to those with one tag. The write and the sends are
        one: nobody is shown what was not kept.
        """
        said = {"from": person(sender), "text": text, "to": to, "at": int(time() * 1000)}
        history = await self.room.storage.get("history", [])
        await self.room.storage.put("history", [*history, said][-HISTORY_MESSAGES:])
        self.room.broadcast({"type": "said", **said}, tag=to)
        if to is not None and to not in sender.tags:
            sender.send({"type": "said", **said})

    def on_close(self, connection: Connection) -> None:
        """Tell the others. This comes once for each connection that was accepted, however it ended."""
        self.spoken.pop(connection.id, None)
        if connection.state:
            gone = person(connection)
            self.room.broadcast({"type": "left", "person": gone, "line": f"{gone['name']} has left"})

    def too_fast(self, sender: Connection) -> bool:
        """Say whether this is one message too many for the last few seconds."""
        now = monotonic()
        times = [at for at in self.spoken[sender.id] if now - at < BURST_SECONDS]
        self.spoken[sender.id] = [*times[-BURST_MESSAGES:], now]
        return len(times) >= BURST_MESSAGES

    @staticmethod
    def on_fetch(request: Request) -> Response:
        """Answer what belongs to no room: here the page. HTTP to a room would be `on_request`."""
        if request.path not in FILES:
            raise Refuse(404, "there is no such page")
        if request.method not in ("GET", "HEAD"):
            raise Refuse(405, "use GET")
        name, content_type = FILES[request.path]
        return Response((FOLDER / name).read_bytes(), headers={**HEADERS, "Content-Type": content_type})


def person(connection: Connection) -> dict[str, str]:
    """What others are shown of a connection, from its state and its tag."""
    return {"id": connection.id, "name": connection.state["name"], "flag": connection.tags[0]}


def parse(message: str | bytes) -> Any:
    """Read JSON from a client; None if it is none."""
    try:
        return json.loads(message)
    except (ValueError, RecursionError):
        return None


def clean(text: str, characters: int) -> str:
    """Bound a text, and replace lone surrogates: JSON can spell them, UTF-8 cannot."""
    return text.encode(errors="replace").decode().strip()[:characters]


def short(name: str) -> str:
    """Make a name that fits in a line."""
    return clean(" ".join(name.split()), NAME_CHARACTERS) or "Somebody"


def country(flag: str) -> str:
    """Make a country's tag: two small letters, whatever the client wrote."""
    return flag if len(flag) == 2 and flag.isascii() and flag.islower() and flag.isalpha() else "un"


FOLDER = Path(__file__).parent
FILES: Mapping[str, tuple[str, str]] = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/socket.js": ("socket.js", "text/javascript; charset=utf-8"),
    "/strip.js": ("strip.js", "text/javascript; charset=utf-8"),
    "/flags.svg": ("flags.svg", "image/svg+xml"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
