"""Questions and orders from outside: the command line over the Unix socket, the admin pages over HTTP.

Owns the commands and the shape of their answers. Wakes no room; what only a host knows (which rooms are
awake) is asked of the hosts. Peers: `hibernation.admin` (the command line's side), `http`, `core`.
"""

import os
import socket
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import parse_qs

import trio

from broker.gateway.connections import CONNECTING, OPEN
from broker.gateway.frames import encode_message, sendable
from broker.gateway.http import RequestRefused
from broker.gateway.links import HostLink
from hibernation import wire
from hibernation.link import LinkError, StreamDecoder, encode
from storage.errors import BrokerError

if TYPE_CHECKING:
    from broker.gateway.core import Gateway

#: Rows of one page, unless the question says fewer.
PAGE_ROWS: Final = 256
#: How long a host may take to answer before the answer goes without it.
HOST_SECONDS: Final = 2.0
#: A question may hold a message.
QUESTION_BYTES_MAX: Final = 64 * 1024 * 1024


class CommandError(Exception):
    """The command cannot be carried out; the text says why."""


class Admin:
    """See the module."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway
        self._number = 0
        self._waiting: dict[int, tuple[trio.Event, list[Any]]] = {}

    # --- Transport --------------------------------------------------------------------------------

    def serve_socket(self, sock: socket.socket) -> None:
        """Answer one command line's questions until it hangs up."""
        trio.lowlevel.spawn_system_task(self._serve, sock)

    async def _serve(self, sock: socket.socket) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        decoder = StreamDecoder(QUESTION_BYTES_MAX)
        try:
            async with stream:
                while data := await stream.receive_some():
                    decoder.feed(data)
                    for question in decoder:
                        await stream.send_all(encode(await self._answer(question)))
        except (OSError, LinkError, trio.BrokenResourceError):
            return  # whoever asked has gone, or never was one of ours

    async def _answer(self, question: Any) -> dict[str, Any]:
        try:
            if not isinstance(question, dict):
                raise CommandError("a question is a map")
            return {"result": await self.command(question)}
        except (CommandError, RequestRefused) as error:
            return {"error": str(error)}
        except Exception as error:  # noqa: BLE001 - told to whoever asked, who is this machine's user
            return {"error": f"{type(error).__name__}: {error}"}

    async def http(self, method: str, path: str, query: bytes) -> Any:
        """Answer `/_broker/api/COMMAND?name=value`; only questions, no orders.

        Raises:
            RequestRefused: 404 for an unknown command, 405 for another method than GET, 400 for a bad
                parameter.
        """
        name = path.strip("/")
        if name not in ("stats", "rooms", "connections"):
            raise RequestRefused(404, "no such command")
        if method not in ("GET", "HEAD"):
            raise RequestRefused(405, "use GET", (("allow", "GET"),))
        question: dict[str, Any] = {"command": name}
        for key, values in parse_qs(query.decode("latin-1")).items():
            question[key] = values if key in ("all_of", "any_of", "none_of") else values[-1]
        try:
            return await self.command(question)
        except (CommandError, BrokerError) as error:
            raise RequestRefused(400, str(error)) from None

    async def command(self, question: dict[str, Any]) -> Any:
        """Carry out one command; CommandError if that is not possible."""
        handler = self._COMMANDS.get(question.get("command", ""))
        if handler is None:
            raise CommandError(f"unknown command {question.get('command')!r}")
        return await handler(self, question)

    # --- Hosts ------------------------------------------------------------------------------------

    async def _ask(self, host: HostLink, what: str, argument: Any) -> Any:
        self._number = number = self._number + 1
        answered, box = trio.Event(), list[Any]()
        self._waiting[number] = (answered, box)
        host.put([wire.ASK, number, what, argument])
        host.flush()
        with trio.move_on_after(HOST_SECONDS):
            await answered.wait()
        self._waiting.pop(number, None)
        return box[0] if box else None

    def answered(self, number: int, value: Any) -> None:
        """A host has answered."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting[1].append(value)
            waiting[0].set()

    async def _ask_all(self, what: str, argument: Any) -> list[Any]:
        answers: list[Any] = []

        async def ask(host: HostLink) -> None:
            answers.append(await self._ask(host, what, argument))

        async with trio.open_nursery() as nursery:
            for host in list(self._gateway.links.hosts):
                nursery.start_soon(ask, host)
        return [answer for answer in answers if answer is not None]

    # --- Commands ---------------------------------------------------------------------------------

    async def _stats(self, _: dict[str, Any]) -> dict[str, Any]:
        gateway = self._gateway
        table, lifecycle, effects = gateway.connections, gateway.lifecycle, gateway.effects
        hosts = await self._ask_all("stats", None)
        hosts.sort(key=lambda host: host["index"])
        return {
            "address": list(gateway.config.address),
            "durability": gateway.config.settings.durability,
            "ready": gateway.ready(),
            "supervisor": os.getppid(),
            "gateways": [os.getpid()],
            "hosts": [host["pid"] for host in hosts],
            "connections": table.phase.count(OPEN) + table.phase.count(CONNECTING),
            "half_open": gateway.doors.half_open,
            "rooms": len(gateway.rooms.by_key),
            "awake": sum(host["awake"] for host in hosts),
            "wakes": sum(host["wakes"] for host in hosts),
            "turns": sum(host["turns"] for host in hosts),
            "failed_turns": sum(host["failed_turns"] for host in hosts),
            "commits": sum(host["commits"] for host in hosts),
            "accepted": lifecycle.accepted,
            "refused": {str(status): count for status, count in gateway.doors.refused.items()},
            "closes": dict(lifecycle.closes),
            "messages": gateway.inbox.messages,
            "frames_sent": gateway.sender.sent,
            "broadcasts": effects.broadcasts,
            "deliveries": effects.deliveries,
            "missed_sends": effects.missed,
            "dropped_frames": gateway.sender.dropped,
            "outbox_bytes": gateway.sender.total_bytes,
            "requests": gateway.forward.requests,
            "parties": sorted({party.name for party in gateway.parties.values()}),
        }

    async def _rooms(self, question: dict[str, Any]) -> dict[str, Any]:
        """A page of the rooms that have connections, by key; or one room, with connections or without."""
        gateway = self._gateway
        limit = _integer(question, "limit", PAGE_ROWS)
        party, room = question.get("party"), question.get("room")
        if party is not None and party not in gateway.parties:
            raise CommandError(f"unknown party {party!r}; there are: {self._party_names()}")
        if room is not None:
            view = gateway.parties.get(party or "main")
            if view is None:
                raise CommandError(f"unknown party {party or 'main'!r}")
            keys = [f"{view.name}/{room}"]
        else:
            after = question.get("after", "")
            prefix = f"{gateway.parties[party].name}/" if party else ""
            keys = sorted([key for key in gateway.rooms.by_key if key > after and key.startswith(prefix)])[
                :limit
            ]
        known: dict[str, Any] = {}
        for answer in await self._ask_all("rooms", keys):
            known.update(answer)
        rows = []
        for key in keys:
            record = gateway.rooms.by_key.get(key)
            party_name, _, room_id = key.partition("/")
            facts = known.get(key, {})
            rows.append(
                {
                    "party": party_name,
                    "room": room_id,
                    "connections": record.count if record is not None else 0,
                    "in_flight": record.inflight_events if record is not None else 0,
                    "awake": facts.get("awake", False),
                    "wakes": facts.get("wakes", 0),
                    "woke_seconds_ago": facts.get("woke_seconds_ago"),
                }
            )
        return {"rooms": rows, "after": keys[-1] if len(keys) == limit and room is None else None}

    async def _connections(self, question: dict[str, Any]) -> dict[str, Any]:
        """A page of connections, from the registry: by party, room, id and tags."""
        gateway = self._gateway
        limit = _integer(question, "limit", PAGE_ROWS)
        all_of = [*question.get("all_of", ()), *([question["tag"]] if question.get("tag") else [])]
        party = question.get("party")
        if party is not None and party in gateway.parties:
            party = gateway.parties[party].name
        rows = gateway.registry.query(
            party,
            question.get("room"),
            question.get("id"),
            all_of,
            question.get("any_of", ()),
            question.get("none_of", ()),
            _integer(question, "after", 0),
            limit,
        )
        return {
            "connections": [
                {
                    "number": row.number,
                    "party": row.party,
                    "room": row.room,
                    "id": row.id,
                    "uri": row.uri,
                    "tags": list(row.tags),
                    "accepted_at": row.accepted_at,
                    "state_bytes": 0 if row.state is None else len(row.state),
                }
                for row in rows
            ],
            "after": rows[-1].number if len(rows) == limit else None,
        }

    async def _broadcast(self, question: dict[str, Any]) -> dict[str, Any]:
        gateway = self._gateway
        room = gateway.rooms.by_key.get(self._key(question))
        if room is None:
            return {"sent": 0}
        all_of = [*question.get("all_of", ()), *([question["tag"]] if question.get("tag") else [])]
        slots = gateway.rooms.select(
            room, [all_of, list(question.get("any_of", ())), list(question.get("none_of", ()))]
        )
        gateway.sender.send_to_many(slots, encode_message(_message(question)))
        return {"sent": len(slots)}

    async def _send(self, question: dict[str, Any]) -> dict[str, Any]:
        slot = self._find(question)
        self._gateway.sender.send(slot, encode_message(_message(question)))
        return {"sent": 1}

    async def _kick(self, question: dict[str, Any]) -> dict[str, Any]:
        code = _integer(question, "code", 1000)
        reason = question.get("reason") or ""
        if not sendable(code):
            raise CommandError(f"{code} may not be sent as a close code: use 1000, or 4000 to 4999")
        if len(reason.encode()) > 123:
            raise CommandError("a close reason has at most 123 bytes of UTF-8")
        self._gateway.lifecycle.close(self._find(question), code, reason, "server_close")
        return {"kicked": 1}

    def _key(self, question: dict[str, Any]) -> str:
        party = question.get("party") or "main"
        view = self._gateway.parties.get(party)
        if view is None:
            raise CommandError(
                f"unknown party {party!r}; there are: {', '.join(sorted(self._gateway.parties))}"
            )
        if not question.get("room"):
            raise CommandError("which room? name it with room")
        return f"{view.name}/{question['room']}"

    def _party_names(self) -> str:
        return ", ".join(sorted(self._gateway.parties))

    def _find(self, question: dict[str, Any]) -> int:
        key = self._key(question)
        row = self._gateway.effects.ask(key, "find", question.get("id") or "")
        if row is None:
            raise CommandError(
                f"room {question['room']!r} has no open connection with id {question.get('id')!r}"
            )
        return int(row[0])

    _COMMANDS: ClassVar = {
        "stats": _stats,
        "rooms": _rooms,
        "connections": _connections,
        "broadcast": _broadcast,
        "send": _send,
        "kick": _kick,
    }


def _message(question: dict[str, Any]) -> str | bytes:
    message = question.get("message")
    if not isinstance(message, str | bytes):
        raise CommandError("a message is text or bytes")
    return message


def _integer(question: dict[str, Any], name: str, default: int) -> int:
    try:
        value = int(question.get(name) or default)
    except (TypeError, ValueError):
        raise CommandError(f"{name} is a whole number") from None
    if not 0 <= value < 1 << 63:  # SQLite's largest
        raise CommandError(f"{name} is a whole number from 0 to 2**63 - 1")
    return value
