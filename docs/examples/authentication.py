"""A door: who has signed in over HTTP may connect, and is who they said they are.

broker dev docs/examples/authentication.py --var SESSION_KEY=change-me --var MEMBERS=ana:sesame,ben:tulip
"""

import hmac
from pathlib import Path
from time import time
from typing import Any

from broker import Connection, ConnectionContext, Lobby, Refuse, Request, Server

PAGE = Path(__file__).with_suffix(".html")
SESSION_SECONDS = 12 * 3600
USER = "X-Broker-User"  # the broker strips headers that begin like this from what clients send


class House(Server):
    @staticmethod
    def on_before_connect(request: Request, lobby: Lobby) -> None:
        """The door for WebSockets. Whom it turns away never reaches a room."""
        admit(request, lobby)

    @staticmethod
    def on_before_request(request: Request, lobby: Lobby) -> None:
        """The same door for HTTP."""
        admit(request, lobby)

    def get_connection_tags(self, _: Connection, ctx: ConnectionContext) -> list[str]:
        """The door has written the name down. As a tag it is shared by all tabs of one user."""
        return [ctx.request.headers[USER]]

    def on_connect(self, connection: Connection) -> None:
        connection.send({"you": user_of(connection)})

    def on_message(self, message: str | bytes, sender: Connection) -> None:
        """`@ben hello` goes to Ben, in all his tabs, and to the sender's own; the rest goes to everybody."""
        said = {"from": user_of(sender), "text": message if isinstance(message, str) else "(bytes)"}
        if said["text"].startswith("@"):
            name = said["text"][1:].partition(" ")[0]
            self.room.broadcast(said, any_of=[name, user_of(sender)])
        else:
            self.room.broadcast(said)

    async def on_request(self, request: Request) -> dict[str, Any]:
        """Who asks, and who is here."""
        here = {user_of(each) async for each in self.room.get_connections() if each.tags}
        return {"you": request.headers[USER], "here": sorted(here)}

    @staticmethod
    async def on_fetch(request: Request, lobby: Lobby) -> Any:
        """The page, and `POST /sign-in` with a name and a password."""
        if request.path == "/":
            return PAGE.read_text()
        if request.path != "/sign-in" or request.method != "POST":
            raise Refuse(404, "there is no such page")
        form = await request.form
        name, password = form.get("name", ""), form.get("password", "")
        # In earnest: hashes, in a database of your own.
        passwords = dict(member.split(":", 1) for member in lobby.env["MEMBERS"].split(","))
        if not hmac.compare_digest(password.encode(), passwords.get(name, "").encode()) or not password:
            raise Refuse(403, "wrong name or password")
        token = sign(f"{name}.{int(time()) + SESSION_SECONDS}", lobby.env["SESSION_KEY"])
        cookie = f"session={token}; Path=/; Max-Age={SESSION_SECONDS}; HttpOnly; SameSite=Strict"
        return {"you": name}, {"Set-Cookie": cookie}


def admit(request: Request, lobby: Lobby) -> None:
    """Let in whoever brings a good token, and write their name where no client can write."""
    name = verify(request.cookies.get("session", ""), lobby.env["SESSION_KEY"])
    if name is None:
        raise Refuse(401, "sign in first")
    if str(lobby.id).startswith("~") and lobby.id != f"~{name}":
        raise Refuse(403, "this is somebody's own room")
    request.headers[USER] = name


def sign(text: str, key: str) -> str:
    """The text with a seal that needs the key."""
    return f"{text}.{hmac.digest(key.encode(), text.encode(), 'sha256').hex()}"


def verify(token: str, key: str) -> str | None:
    """The name in a token of ours that has not expired, or None."""
    text, _, _ = token.rpartition(".")
    if not hmac.compare_digest(token.encode(), sign(text, key).encode()):
        return None
    name, _, expires = text.rpartition(".")
    return name if time() < int(expires) else None


def user_of(connection: Connection) -> str:
    return connection.tags[0]
