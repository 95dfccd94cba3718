"""The rooms of a chaos run: every kind of turn, and a stored truth to compare with what clients have seen.

Owns what rooms do with a message, and what they store. Copied into the folder of the run and served from
there, so it imports nothing of the tests. Its peer is `clients`; what each frame means is in `checker`.

Half of the kinds of turns write nothing, and answer with random bytes: a turn whose effects came partly from
one run and partly from another shows as two tokens, or as a body that does not match its token. The others
count in storage and send what they have counted: a turn that was committed twice shows as a number that is
too high.

Keys of a room: `T` counts its turns that wrote; `k:ID` how often a connection's connect turn was committed;
`c:ID` [turns of the connection that wrote, number of the last]; `b:T` each broadcast; `x:ID` each close.
"""

import json
import os
import time
import zlib
from pathlib import Path

from broker import Server

_JOURNAL = os.open(Path(__file__).parent / "rooms.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
os.write(_JOURNAL, b"\n")  # the host before may have died in the middle of a line

#: Colours that a client may ask for in its address: `?tags=a.b`.
TAGS = ("a", "b", "c")


def _note(room, connection, number, kind, mark):
    line = f'[{time.monotonic():.6f},"room","{room}","{connection}",{number},"{kind}",{json.dumps(mark)}]\n'
    os.write(_JOURNAL, line.encode())


def _token():
    return os.urandom(8).hex()


class Main(Server):
    """See the module."""

    def get_connection_tags(self, connection, ctx):
        asked = connection.uri.partition("tags=")[2].partition("&")[0]
        return [tag for tag in asked.split(".") if tag]

    async def on_connect(self, connection, ctx):
        storage = self.room.storage
        turn, times = await storage.get("T", 0), 0
        if "plain=1" not in connection.uri:
            turn += 1
            times, _ = await storage.get(f"k:{connection.id}", (0, 0))
            times += 1
            storage.put({"T": turn, f"k:{connection.id}": [times, turn]})
        token = _token()
        _note(self.room.id, connection.id, 0, "h", token)
        connection.send(["h", turn, times, list(connection.tags)])
        connection.send(["g", token])

    async def on_message(self, message, sender):
        kind, number, *rest = json.loads(message)
        if kind in "espl" or kind == "L":
            self._plain(kind, number, rest, sender)
        else:
            await self._durable(kind, number, rest, sender)

    def _plain(self, kind, number, rest, sender):
        """A turn that neither reads nor writes storage."""
        token = _token()
        _note(self.room.id, sender.id, number, kind, token)
        match kind:
            case "e" | "L":
                sender.send([kind, number, token, token * rest[0]])
            case "s":
                sender.set_state(lambda count: (count or 0) + 1)
                sender.send(["s", number, sender.state])
            case "p":
                self.room.broadcast(["P", sender.id, number, rest[0], token], tag=rest[0])
                sender.send(["p", number, token])
            case "l":
                sender.send(["l", number, token, zlib.crc32(rest[0].encode())])

    async def _durable(self, kind, number, rest, sender):
        """A turn that counts in storage."""
        storage = self.room.storage
        turn = await storage.get("T", 0) + 1
        count, last = await storage.get(f"c:{sender.id}", (0, 0))
        count += 1
        token = _token()
        _note(self.room.id, sender.id, number, kind, token)
        storage.put({"T": turn, f"c:{sender.id}": [count, number]})
        match kind:
            case "c":
                sender.send(["c", number, turn, count, last])
            case "b":
                storage.put(f"b:{turn:09}", [sender.id, number, rest[0], token])
                self.room.broadcast(["B", turn, sender.id, number, rest[0], token], tag=rest[0])
                sender.send(["b", number, turn, count, last, token])
            case "t":
                sender.remove_tags(*sender.tags)
                sender.add_tags(*rest[0])
                sender.send(["t", number, turn, count, last, rest[0]])
            case "x":
                sender.send(["x", number, turn, count, last])
                sender.close(4001, "as asked")
            case "f":
                sender.send(["f", number, turn, count, last])

    async def on_close(self, connection, code, reason, was_clean):
        storage = self.room.storage
        turn = await storage.get("T", 0) + 1
        closes = await storage.get(f"x:{connection.id}", [])
        count, last = await storage.get(f"c:{connection.id}", (0, 0))
        _note(self.room.id, connection.id, 0, "close", [code, connection.close_cause])
        closes.append([turn, code, connection.close_cause, count, last])
        storage.put({"T": turn, f"x:{connection.id}": closes})

    async def on_request(self, request):
        """The truth: all that the room has stored, and who is connected."""
        stored = await self.room.storage.list()
        told = {"T": stored.get("T", 0), "k": {}, "c": {}, "b": {}, "x": {}}
        for key, value in stored.items():
            name, colon, rest = key.partition(":")
            if colon:
                told[name][rest] = value
        told["connected"] = [connection.id async for connection in self.room.get_connections()]
        return told
