"""A chat in which a model takes part: it writes its answers bit by bit, while the others go on talking.

broker dev docs/examples/ai_chat.py
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import trio

from broker import Connection, ConnectionContext, Refuse, Request, Server

PAGE = Path(__file__).with_suffix(".html")
SHOWN_LINES = 50
HEARTBEAT_SECONDS = 2


class AIChat(Server):
    async def on_start(self) -> None:
        """After waking, go on with answers that the end of a process has cut off."""
        for name, prompt in (await self.room.storage.list(prefix="unfinished ")).items():
            self.room.start_soon(self.answer, name.removeprefix("unfinished "), prompt)

    async def on_connect(self, connection: Connection, ctx: ConnectionContext) -> None:
        connection.set_state({"name": ctx.request.args.get("name", "")[:24] or "Somebody"})
        lines = await self.room.storage.list(prefix="line ", reverse=True, limit=SHOWN_LINES)
        connection.send({"lines": dict(reversed(lines.items()))})

    async def on_message(self, message: str | bytes, sender: Connection) -> None:
        """Keep what was said and show it. If it is for the model, have it answered, and do not wait."""
        await self.say(sender.state["name"], str(message))
        if str(message).startswith("@ai "):
            key = await self.say("ai")
            prompt = str(message).removeprefix("@ai ")
            await self.room.storage.put(f"unfinished {key}", prompt)
            await self.room.storage.set_alarm(HEARTBEAT_SECONDS)
            self.room.start_soon(self.answer, key, prompt)

    async def answer(self, key: str, prompt: str) -> None:
        """Background work: have the model write the rest of a line. Each bit is shown when it is kept."""
        line = await self.room.storage.get(key)
        try:
            async with aclosing(model(prompt, "".join(line["bits"]))) as bits:
                async for bit in bits:
                    await self.write(key, line, bit)
                    await self.room.flush()
        except ModelError as error:
            await self.write(key, line, f"({error})")
        await self.room.storage.delete(f"unfinished {key}")

    async def on_alarm(self) -> None:
        """A heartbeat while there are answers to finish. If their process has died it wakes the room in the
        next one, and `on_start` goes on with them.
        """
        if await self.room.storage.list(prefix="unfinished ", limit=1):
            await self.room.storage.set_alarm(HEARTBEAT_SECONDS)

    async def say(self, name: str, *bits: str) -> str:
        """Begin a line of the conversation; gives its key."""
        number = await self.room.storage.get("lines", 0) + 1
        key, line = f"line {number:09}", {"from": name, "bits": bits}
        await self.room.storage.put({"lines": number, key: line})
        self.room.broadcast({"lines": {key: line}})
        return key

    async def write(self, key: str, line: dict[str, Any], bit: str) -> None:
        """Add a bit to a line. It has a number, so that it has its place, once, whoever sees it when."""
        self.room.broadcast({"key": key, "number": len(line["bits"]), "bit": bit})
        line["bits"].append(bit)
        await self.room.storage.put(key, line)

    @staticmethod
    def on_fetch(request: Request) -> str:
        if request.path != "/":
            raise Refuse(404, "there is no such page")
        return PAGE.read_text()


class ModelError(Exception):
    """The model cannot answer."""


async def model(prompt: str, so_far: str) -> AsyncGenerator[str, None]:
    """A stand-in for a model. It is slow, speaks word by word, and can go on where it was cut off."""
    if prompt == "fail":
        raise ModelError("no answer today")
    words = f"You said: {prompt} - and I have been thinking about it.".split()
    for word in words[len(so_far.split()) :]:
        await trio.sleep(0.1)
        yield f"{word} "
