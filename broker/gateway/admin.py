"""Questions and orders from outside: the command line over the Unix socket, the admin pages over HTTP.

Owns the commands and the shape of their answers. Wakes no room; what only a host knows (which rooms are
awake) is asked of the hosts. Peers: `hibernation.admin` (the command line's side), `http`, `core`.
"""

import os
import re
import secrets
import socket
from typing import TYPE_CHECKING, Any, ClassVar, Final
from urllib.parse import parse_qs

import trio

from broker.gateway.connections import CONNECTING, OPEN
from broker.gateway.frames import sendable
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
#: How long a replayed turn may take before the answer goes without its end.
REPLAY_SECONDS: Final = 60.0
#: The shard and the number of a dead letter.
_LETTER_ID: Final = re.compile(r"(\d{1,4})\.(\d{1,18})")
#: Statistics of hosts about alarms and crons.
_OF_ALARMS: Final = ("alarms", "failed_alarms", "alarm_runs", "alarm_failures", "cron_runs", "cron_failures")
#: What a host says that does not answer in time.
_SILENCE: Final = object()
#: What one says that dies before.
_GONE: Final = object()
#: A question may hold a message.
QUESTION_BYTES_MAX: Final = 64 * 1024 * 1024


class CommandError(Exception):
    """The command cannot be carried out; the text says why."""


class Admin:
    """See the module."""

    def __init__(self, gateway: "Gateway") -> None:
        self._gateway = gateway
        # A host may still say what was meant for a former gateway: its numbers are none of ours.
        self._number = secrets.randbits(52)
        self._waiting: dict[int, tuple[trio.Event, list[Any], HostLink]] = {}
        #: Whoever arranges a successor: when they are gone before it is there, this gateway goes on.
        self._freezing: trio.SocketStream | None = None

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
                        if isinstance(question, dict) and question.get("command") == "freeze":
                            self._freezing = stream
                        await stream.send_all(encode(await self._answer(question)))
        except (OSError, LinkError, trio.BrokenResourceError):
            pass  # whoever asked has gone, or never was one of ours
        finally:
            if self._freezing is stream:
                self._freezing = None
                self._gateway.resume()  # nothing happens if a successor has everything

    async def _answer(self, question: Any) -> dict[str, Any]:
        try:
            if not isinstance(question, dict):
                raise CommandError("a question is a map")
            return {"result": await self.command(question)}
        except (CommandError, RequestRefused, BrokerError) as error:
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

    async def _ask(self, host: HostLink, what: str, argument: Any, seconds: float = HOST_SECONDS) -> Any:
        self._number = number = self._number + 1
        answered, box = trio.Event(), list[Any]()
        self._waiting[number] = (answered, box, host)
        host.put([wire.ASK, number, what, argument])
        host.flush()
        with trio.move_on_after(seconds):
            await answered.wait()
        self._waiting.pop(number, None)
        return box[0] if box else _SILENCE

    def answered(self, number: int, value: Any) -> None:
        """A host has answered."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            waiting[1].append(value)
            waiting[0].set()

    def host_gone(self, host: HostLink) -> None:
        """A host has died: it answers nothing any more."""
        for answered, box, asked in self._waiting.values():
            if asked is host:
                box.append(_GONE)
                answered.set()

    async def _ask_all(self, what: str, argument: Any) -> tuple[list[Any], list[HostLink]]:
        """What the hosts say, and which of them say nothing in time."""
        answers: list[Any] = []
        silent: list[HostLink] = []

        async def ask(host: HostLink) -> None:
            answer = await self._ask(host, what, argument)
            if answer is _SILENCE or answer is _GONE:
                silent.append(host)
            else:
                answers.append(answer)

        async with trio.open_nursery() as nursery:
            for host in list(self._gateway.links.hosts):
                nursery.start_soon(ask, host)
        return answers, silent

    # --- Commands ---------------------------------------------------------------------------------

    async def _stats(self, _: dict[str, Any]) -> dict[str, Any]:
        gateway = self._gateway
        table, lifecycle, effects = gateway.connections, gateway.lifecycle, gateway.effects
        hosts, silent = await self._ask_all("stats", None)
        hosts.sort(key=lambda host: host["index"])
        return {
            "address": list(gateway.config.address),
            "durability": gateway.config.settings.durability,
            "ready": gateway.ready(),
            "supervisor": os.getppid(),
            "gateways": [os.getpid()],
            "hosts": [host["pid"] for host in hosts],
            "silent_hosts": sorted(host.description["pid"] for host in silent),
            "connections": table.phase.count(OPEN) + table.phase.count(CONNECTING),
            "half_open": gateway.doors.half_open,
            "rooms": len(gateway.rooms.by_key),
            "awake": sum(host["awake"] for host in hosts),
            "wakes": sum(host["wakes"] for host in hosts),
            "turns": sum(host["turns"] for host in hosts),
            "failed_turns": sum(host["failed_turns"] for host in hosts),
            "commits": sum(host["commits"] for host in hosts),
            "paused": gateway.paused(),
            "accepted": lifecycle.accepted,
            "refused": {str(status): count for status, count in gateway.doors.refused.items()},
            "closes": dict(lifecycle.closes),
            "messages": gateway.inbox.messages,
            "auto_responses": lifecycle.answers,
            "compressed": table.compressed,
            "frames_sent": gateway.sender.sent,
            "broadcasts": effects.broadcasts,
            "deliveries": effects.deliveries,
            "missed_sends": effects.missed,
            "dropped_frames": gateway.sender.dropped,
            "outbox_bytes": gateway.sender.total_bytes,
            "requests": gateway.forward.requests,
            "quarantined": len(gateway.quarantine),
            "suspects": sum(host["suspects"] for host in hosts),
            "dead_letters": sum(host["dead_letters"] for host in hosts),
            **{name: sum(host[name] for host in hosts) for name in _OF_ALARMS},
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
        answers, silent = await self._ask_all("rooms", keys)
        for answer in answers:
            known.update(answer)
        # Nobody says whether a room of a silent host is awake.
        unknown = {shard for host in silent for shard in host.shards}
        rows = []
        for key in keys:
            record = gateway.rooms.by_key.get(key)
            party_name, _, room_id = key.partition("/")
            facts = known.get(key, {})
            shard = wire.partition_of(key) % gateway.links.shard_count
            rows.append(
                {
                    "party": party_name,
                    "room": room_id,
                    "connections": record.count if record is not None else 0,
                    "in_flight": record.inflight_events if record is not None else 0,
                    "awake": facts.get("awake", None if shard in unknown else False),
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
        criteria = [all_of, list(question.get("any_of", ())), list(question.get("none_of", ()))]
        count = len(gateway.rooms.select(room, criteria))
        gateway.effects.order([[wire.BROADCAST, room.key, _message(question), [], *criteria]])
        return {"sent": count}

    async def _send(self, question: dict[str, Any]) -> dict[str, Any]:
        gateway, slot = self._gateway, self._find(question)
        gateway.effects.order([[wire.SEND, slot, gateway.connections.number[slot], _message(question)]])
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

    async def _freeze(self, question: dict[str, Any]) -> dict[str, Any]:
        paused_at = await self._gateway.freeze(float(question.get("patience_seconds", 0)))
        return {"frozen": True, "paused_at": paused_at}

    async def _resume(self, _: dict[str, Any]) -> dict[str, Any]:
        self._gateway.resume()
        return {"frozen": self._gateway.frozen}

    async def _leave(self, _: dict[str, Any]) -> dict[str, Any]:
        if not self._gateway.frozen:
            raise CommandError("this gateway is not frozen: nobody can have taken its place")
        self._gateway.leave()
        return {"leaving": True}

    async def _drain(self, question: dict[str, Any]) -> dict[str, Any]:
        seconds = float(question.get("seconds", self._gateway.config.settings.drain))
        return {"closed": await self._gateway.drain(seconds)}

    # --- What ended hosts, and rooms that do not start --------------------------------------------

    async def _ask_shard(self, shard: int, what: str, argument: Any, seconds: float = HOST_SECONDS) -> Any:
        host = self._gateway.links.by_shard[shard]
        if host is None:
            raise CommandError("the host is not there at the moment: ask again")
        answer = await self._ask(host, what, argument, seconds)
        if answer is _SILENCE:
            raise CommandError(
                "the host does not answer: a handler may block it, and then the log says which one"
            )
        if answer is _GONE:
            raise CommandError("the host has died meanwhile")
        return answer

    async def _dead_letters(self, question: dict[str, Any]) -> dict[str, Any]:
        """A page of dead letters, by shard and number."""
        limit = min(_integer(question, "limit", PAGE_ROWS), PAGE_ROWS)
        first, after = self._letter_id(question["after"]) if question.get("after") else (0, 0)
        rows: list[Any] = []
        for shard in range(first, self._gateway.links.shard_count):
            argument = [shard, after if shard == first else 0, limit - len(rows)]
            rows += await self._ask_shard(shard, "letters", argument)
            if len(rows) >= limit:
                return {"dead_letters": rows, "after": rows[-1]["id"]}
        return {"dead_letters": rows, "after": None}

    async def _dead_letter(self, question: dict[str, Any]) -> Any:
        return await self._of_letter(question, "letter")

    async def _replay(self, question: dict[str, Any]) -> Any:
        """Have the event of a dead letter run once more; answers when its turn has ended."""
        return await self._of_letter(question, "replay", REPLAY_SECONDS)

    async def _delete_dead_letter(self, question: dict[str, Any]) -> Any:
        return await self._of_letter(question, "remove")

    async def _of_letter(self, question: dict[str, Any], what: str, seconds: float = HOST_SECONDS) -> Any:
        shard, number = self._letter_id(question.get("id"))
        answer = await self._ask_shard(shard, what, [shard, number], seconds)
        if answer is None:
            raise CommandError(f"there is no dead letter {question['id']!r}")
        if "error" in answer:
            raise CommandError(answer["error"])
        return answer

    def _letter_id(self, text: Any) -> tuple[int, int]:
        found = _LETTER_ID.fullmatch(text) if isinstance(text, str) else None
        if found is None or int(found[1]) >= self._gateway.links.shard_count:
            raise CommandError(f"{text!r} is no dead letter: `broker dead-letters list` shows their ids")
        return int(found[1]), int(found[2])

    async def _explain(self, question: dict[str, Any]) -> dict[str, Any]:
        """Why a room is awake, or is not started; with `release` it is tried again."""
        gateway = self._gateway
        key = self._key(question)
        record = gateway.rooms.by_key.get(key)
        shard = wire.partition_of(key) % gateway.links.shard_count
        party, _, room = key.partition("/")
        facts: dict[str, Any] = {
            "party": party,
            "room": room,
            "connections": record.count if record is not None else 0,
            "in_flight": record.inflight_events if record is not None else 0,
        }
        if question.get("release"):
            facts |= await self._ask_shard(shard, "release", key)
        facts |= await self._ask_shard(shard, "explain", key)
        return facts

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
        "freeze": _freeze,
        "resume": _resume,
        "leave": _leave,
        "drain": _drain,
        "dead_letters": _dead_letters,
        "dead_letter": _dead_letter,
        "replay": _replay,
        "delete_dead_letter": _delete_dead_letter,
        "explain": _explain,
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
