"""What a scenario may do, whichever broker runs it, and the record of what it has seen.

Owns the interface that both drivers have, and the record: for each client, and for HTTP, the lines in order.
What happens to different clients at the same time is free to differ in order, so there is no common order.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote

from broker import Server
from hibernation.party import kebab

__all__ = ["Answer", "Client", "Connector", "Stage", "scenarios_of"]

#: Headers of answers that a record holds; the others say when and by whom.
RECORDED_HEADERS = ("content-type", "location", "retry-after", "x-room", "allow", "set-cookie")


class Answer:
    """What came back on an HTTP request, or on an upgrade that was refused."""

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = dict(headers)
        self.body = body

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Connector(ABC):
    """One WebSocket of a driver, below `Client`."""

    @abstractmethod
    def send(self, message: str | bytes) -> None: ...

    @abstractmethod
    def receive(self) -> str | bytes: ...

    @abstractmethod
    def send_close(self, code: int, reason: str) -> None: ...

    @abstractmethod
    def await_close(self) -> tuple[int, str]:
        """Code and reason of the Close that comes next; 1005 without a code, 1006 without a Close."""

    @abstractmethod
    def barrier(self) -> None:
        """All that the client's own messages have brought about has come."""

    @abstractmethod
    def drop(self) -> None: ...

    @abstractmethod
    def hang(self) -> None:
        """Answer nothing, not even pings, until `wake`."""

    @abstractmethod
    def wake(self) -> None: ...

    @abstractmethod
    def has_more(self) -> bool:
        """Whether something has come that nobody took."""


class Client:
    """A client of a scenario: what it does, and sees that it comes."""

    def __init__(self, stage: "Stage", name: str, connector: Connector) -> None:
        self._record = stage.record
        self.name = name
        self._connector = connector
        self.ended = False

    def _note(self, text: str) -> None:
        self._record.setdefault(self.name, []).append(text)

    def send(self, *messages: Any) -> None:
        """Send messages: text, bytes, or anything else as JSON."""
        for message in messages:
            given = message if isinstance(message, str | bytes) else json.dumps(message)
            self._note(f"> {given!r}")
            self._connector.send(given)

    def receive(self) -> str | bytes:
        message = self._connector.receive()
        self._note(f"< {message!r}")
        return message

    def receive_json(self) -> Any:
        return json.loads(self.receive())

    def expect(self, *messages: Any) -> None:
        """The next messages are these; one that is neither text nor bytes is compared as JSON."""
        for message in messages:
            came = self.receive()
            seen = came if isinstance(message, str | bytes) else json.loads(came)
            assert seen == message, f"{self.name} expects {message!r}, and {came!r} came"

    def expect_in_any_order(self, *messages: Any) -> None:
        """The next messages are these, in whatever order."""
        came = [self._connector.receive() for _ in messages]
        self._note(f"< {sorted(map(repr, came))}")
        for message in messages:
            found = next((each for each in came if _reads_as(each, message)), None)
            assert found is not None, f"{self.name} expects {message!r}, and {came} came"
            came.remove(found)

    def expect_nothing(self) -> None:
        """Nothing more comes of what this client has sent."""
        self._connector.barrier()
        assert not self._connector.has_more(), f"{self.name} was sent more: {self._connector.receive()!r}"
        self._note("nothing")

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say Close (1005: without a code), and see it answered with the same code."""
        self._note(f"> close {code} {reason}")
        self._connector.send_close(code, reason)
        self.expect_close(code)

    def expect_close(self, code: int, reason: str | None = None) -> None:
        """The room's Close comes next, or the answer to ours."""
        came = self._connector.await_close()
        self.ended = True
        self._note(f"< close {came[0]} {came[1]}")
        assert came[0] == code, f"{self.name} expects to be closed with {code}, and it was with {came}"
        assert reason is None or came[1] == reason, came

    def hang(self) -> None:
        """Answer nothing, not even pings, until `wake`."""
        self._connector.hang()

    def wake(self) -> None:
        """Be there again."""
        self._connector.wake()

    def drop(self) -> None:
        """Vanish without a word."""
        self._note("> drop")
        self.ended = True
        self._connector.drop()


class Stage(ABC):
    """Where a scenario plays. Rooms are its own: they have its name before theirs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.record: dict[str, list[str]] = {}
        self._clients: list[Client] = []

    # --- What a scenario does ---------------------------------------------------------------------

    def room(self, room: str = "") -> str:
        """The id of a room of this scenario."""
        return f"{self.name}{'-' if room else ''}{room}"

    def path(self, server: type[Server], room: str = "", rest: str = "") -> str:
        """The address of a room of this scenario."""
        return f"/parties/{kebab(server.__name__)}/{quote(self.room(room), safe='')}{rest}"

    def connect(
        self,
        server: type[Server],
        name: str,
        *,
        room: str = "",
        rest: str = "",
        query: str = "",
        headers: Mapping[str, str] | None = None,
        subprotocols: Sequence[str] = (),
    ) -> Client:
        """Come in, under this id; `name` may have a suffix after "+" if the same id comes twice."""
        target = f"{self.path(server, room, rest)}?_pk={quote(name.partition('+')[0])}{query and '&'}{query}"
        came = self._connect(target, dict(headers or {}), list(subprotocols))
        self.record.setdefault(name, []).append("came in" if isinstance(came, Connector) else "refused")
        assert isinstance(came, Connector), (came.status, came.body)
        client = Client(self, name, came)
        self._clients.append(client)
        return client

    def refused(
        self,
        server: type[Server],
        name: str,
        *,
        room: str = "",
        query: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask to come in, and be refused."""
        target = f"{self.path(server, room)}?_pk={quote(name)}{query and '&'}{query}"
        came = self._connect(target, dict(headers or {}), [])
        assert isinstance(came, Answer), "it was let in"
        self._note_answer(name, "refused", came)
        return came

    def request(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
    ) -> Answer:
        """Make an HTTP request."""
        answer = self._request(method, path, dict(headers or {}), body)
        self._note_answer("http", f"{method} {path}", answer)
        return answer

    def _note_answer(self, name: str, what: str, answer: Answer) -> None:
        shown = {key: answer.headers[key] for key in RECORDED_HEADERS if key in answer.headers}
        self.record.setdefault(name, []).append(f"{what}: {answer.status} {shown} {answer.body!r}")

    def note(self, name: str, value: Any) -> None:
        """Have something else in the record."""
        self.record.setdefault(name, []).append(repr(value))

    def finish(self) -> dict[str, list[str]]:
        """Let go of all clients, of which none was sent anything that the scenario has not taken."""
        staying = [client for client in self._clients if not client.ended]
        for client in staying:
            client.expect_nothing()
        for client in staying:
            client.drop()
        return self.record

    # --- What drivers do --------------------------------------------------------------------------

    @abstractmethod
    def _connect(
        self, target: str, headers: dict[str, str], subprotocols: list[str]
    ) -> Connector | Answer: ...

    @abstractmethod
    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer: ...

    @abstractmethod
    def asleep(self, server: type[Server], room: str = "") -> int:
        """Wait until the room sleeps; gives how many objects there have been of it since the host began."""

    @abstractmethod
    def ask(self, command: str, **parameters: object) -> Any:
        """Give a command of the command line: `broadcast`, `send`, `kick`, `rooms`."""

    @abstractmethod
    def pause(self, seconds: float) -> None:
        """Let a short time pass."""

    @abstractmethod
    def crash_host(self) -> None: ...

    @abstractmethod
    def crash_gateway(self) -> None: ...

    @abstractmethod
    def reload(self) -> None:
        """Replace the code by the same code."""

    @abstractmethod
    @contextmanager
    def errors(self, *kinds: type[BaseException]) -> Iterator[None]:
        """Room code raises these in the block, in this order, and the broker logs them with traceback."""


def _reads_as(came: str | bytes, message: Any) -> bool:
    return came == message or (not isinstance(message, str | bytes) and json.loads(came) == message)


Scenario = Callable[[Stage], None]


def scenarios_of(module: object) -> dict[str, Scenario]:
    """The scenarios of a module, by name."""
    return {
        name.removeprefix("scenario_"): function
        for name, function in vars(module).items()
        if name.startswith("scenario_")
    }
