"""Runs a scenario against the real command, with raw sockets."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from broker import Server
from hibernation.party import kebab
from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess, eventually
from tests.e2e.raw_client import BINARY, CLOSE, PING, PONG, TEXT, RawClient
from tests.scenarios.driver import Answer, Connector, Stage

__all__ = ["APP", "ProcessStage"]

#: The parties of all scenarios: an app's own are the classes that its module defines.
APP = """
from tests.scenarios import parties

for _server in parties():
    globals()[_server.__name__] = type(_server.__name__, (_server,), {"__module__": __name__})
"""


class RawConnector(Connector):
    def __init__(self, raw: RawClient, quiet: Callable[[], bool]) -> None:
        self._raw = raw
        self._quiet = quiet
        self._waiting: list[str | bytes] = []
        self._closed: tuple[int, str] | None = None
        self._barriers = 0

    def _frame(self) -> bytes | None:
        """Take one frame; gives the payload of a pong."""
        opcode, payload = self._raw.receive_frame()
        if opcode == PONG:
            return payload
        if opcode == PING:
            with suppress(OSError):  # the broker may have closed meanwhile, and what it has sent tells
                self._raw.send_frame(PONG, payload)
        elif opcode == CLOSE:
            code = int.from_bytes(payload[:2], "big") if payload else 1005
            self._closed = (code, payload[2:].decode())
        else:
            assert opcode in (TEXT, BINARY)
            self._waiting.append(payload.decode() if opcode == TEXT else payload)
        return None

    def send(self, message: str | bytes) -> None:
        self._raw.send(message)

    def receive(self) -> str | bytes:
        while not self._waiting:
            assert self._closed is None, f"closed with {self._closed}"
            self._frame()
        return self._waiting.pop(0)

    def send_close(self, code: int, reason: str) -> None:
        self._raw.send_close(None if code == 1005 else code, reason)

    def await_close(self) -> tuple[int, str]:
        try:
            while self._closed is None:
                self._frame()
        except (EOFError, ConnectionResetError):
            self._closed = (1006, "")
        else:
            assert not self._waiting, f"nobody took {self._waiting}"
            try:
                self._raw.send_frame(CLOSE, self._closed[0].to_bytes(2, "big"))
            except OSError:
                pass  # the answer to ours: the broker has closed already
        self._raw.close()
        return self._closed

    def barrier(self) -> None:
        self._ping()  # all that we have sent has been read
        eventually(self._quiet, "end of all turns")
        self._ping()  # and what came of it is before this pong

    def _ping(self) -> None:
        self._barriers += 1
        mark = f"barrier {self._barriers}".encode()
        self._raw.send_frame(PING, mark)
        while self._frame() != mark:
            assert self._closed is None, f"closed with {self._closed}"

    def drop(self) -> None:
        self._raw.close()

    def hang(self) -> None:
        pass  # it reads when it is told to, and not before

    def wake(self) -> None:
        pass

    def has_more(self) -> bool:
        return bool(self._waiting)


class ProcessStage(Stage):
    """One scenario on a broker that may have played others before."""

    def __init__(self, name: str, broker: BrokerProcess) -> None:
        super().__init__(name)
        self._broker = broker
        self._raw: list[RawClient] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for raw in self._raw:
            raw.close()

    def _connect(self, target: str, headers: dict[str, str], subprotocols: list[str]) -> Connector | Answer:
        given: dict[str, str | None] = {name.lower(): value for name, value in headers.items()}
        if subprotocols:
            given["sec-websocket-protocol"] = ", ".join(subprotocols)
        raw = RawClient(self._broker.port)
        self._raw.append(raw)
        raw.send_handshake(target, given)
        answer = raw.receive_answer()
        if answer.status == 101:
            _, _, party, room, *_ = urlsplit(target).path.split("/", 4)
            return RawConnector(raw, lambda: self._facts(party, unquote(room))["in_flight"] == 0)
        raw.close()
        return Answer(answer.status, answer.headers, answer.body)

    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = HTTPConnection("127.0.0.1", self._broker.port, timeout=DEADLINE_SECONDS)
        try:
            connection.request(method, path, body or None, headers)
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, named, response.read())
        finally:
            connection.close()

    def asleep(self, server: type[Server], room: str = "") -> int:
        party, room = kebab(server.__name__), self.room(room)

        def sleeping() -> dict[str, Any] | None:
            facts = self._facts(party, room)
            return None if facts["awake"] or facts["in_flight"] else facts

        facts = eventually(sleeping, f"sleep of {party}/{room}")
        assert facts is not None
        wakes: int = facts["wakes"]
        return wakes

    def _facts(self, party: str, room: str) -> dict[str, Any]:
        [facts] = self._broker.ask("rooms", party=party, room=room)["rooms"]
        found: dict[str, Any] = facts
        return found

    def ask(self, command: str, **parameters: object) -> Any:
        return self._broker.ask(command, **parameters)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)

    def crash_host(self) -> None:
        self._broker.kill_host()

    def crash_gateway(self) -> None:
        self._broker.kill_gateway()

    def reload(self) -> None:
        status, output = self._broker.command("reload")
        assert status == 0, output

    @contextmanager
    def errors(self, *kinds: type[BaseException]) -> Iterator[None]:
        before = len(self._raised())
        yield
        names = sorted(kind.__name__ for kind in kinds)
        eventually(lambda: sorted(self._raised()[before:]) == names, f"{names} in the log")

    def _raised(self) -> list[str]:
        """The exceptions in the log, by the names of their classes."""
        last_lines = [
            line["exception"].strip().splitlines()[-1]
            for line in self._broker.log_events()
            if line["level"] == "error" and "exception" in line
        ]
        return [line.partition(":")[0].rpartition(".")[2] for line in last_lines]
