"""The app that is measured: one party for each question."""

from urllib.parse import parse_qs, urlsplit

from broker import Connection, ConnectionContext, Request, Server


class Echo(Server):
    """Nothing but an echo: wakes, answers, sleeps."""

    async def on_message(self, message: str, sender: Connection) -> None:
        sender.send(message)


class Put(Server):
    """An echo that writes once a turn."""

    async def on_message(self, message: str, sender: Connection) -> None:
        self.room.storage.put("last", message)
        sender.send(message)


class Tagged(Server):
    """Connections bring their tags in the query. A message is echoed; `=TAG` goes to all that have it."""

    def get_connection_tags(self, connection: Connection, context: ConnectionContext) -> list[str]:
        return parse_qs(urlsplit(connection.uri).query).get("tag", [])

    async def on_message(self, message: str, sender: Connection) -> None:
        if message.startswith("="):
            self.room.broadcast(message, tag=message[1:])
        else:
            sender.send(message)


class Wide(Server):
    """Every message goes to everybody."""

    async def on_message(self, message: str, sender: Connection) -> None:
        self.room.broadcast(message)


class Page(Server):
    """One answer over HTTP."""

    async def on_request(self, request: Request) -> str:
        return "hello"
