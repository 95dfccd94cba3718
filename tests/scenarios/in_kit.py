"""Runs a scenario in the kit; if it is given chance, with deaths of host and gateway at every turn."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from typing import Any
from urllib.parse import unquote, urlsplit

from broker import Server
from broker.testing import Client, ConnectionOver, Kit, Refused
from hibernation.party import kebab
from tests.scenarios.driver import Answer, Connector, Stage

__all__ = ["KitStage"]

PATIENCE_SECONDS = 30.0
GATEWAY_POINTS = ("before_effects", 0, 1, 2, 3, "mid_frame", "after_effects")
HOST_POINTS = ("before_commit", "after_commit")


class KitConnector(Connector):
    def __init__(self, client: Client) -> None:
        self._client = client

    def send(self, message: str | bytes) -> None:
        self._client.send(message)

    def receive(self) -> str | bytes:
        return self._client.receive(PATIENCE_SECONDS)

    def send_close(self, code: int, reason: str) -> None:
        self._client.close(code, reason, PATIENCE_SECONDS)

    def await_close(self) -> tuple[int, str]:
        closed = self._client.expect_close(within=PATIENCE_SECONDS)
        return closed.code, closed.reason

    def barrier(self) -> None:
        try:
            self._client.expect_nothing()
        except ConnectionOver:
            raise
        except AssertionError:
            pass  # `has_more` says so

    def drop(self) -> None:
        self._client.drop()

    def hang(self) -> None:
        self._client.stop_reading()

    def wake(self) -> None:
        self._client.read_on()

    def has_more(self) -> bool:
        return bool(self._client.received)


class ShakenConnector(KitConnector):
    """Before it sends something a death is ordered, at a point that chance chooses."""

    def __init__(self, client: Client, kit: Kit, chance: Random) -> None:
        super().__init__(client)
        self._kit = kit
        self._chance = chance

    def send(self, message: str | bytes) -> None:
        if not self._kit.ordered:
            if self._chance.random() < 0.5:
                self._kit.crash_gateway(at=self._chance.choice(GATEWAY_POINTS))
            else:
                self._kit.crash_host(at=self._chance.choice(HOST_POINTS))
        super().send(message)


class KitStage(Stage):
    """One scenario on a kit that may have played others before."""

    def __init__(self, name: str, kit: Kit, chance: Random | None = None) -> None:
        super().__init__(name)
        self.kit = kit
        self._chance = chance

    def _connect(self, target: str, headers: dict[str, str], subprotocols: list[str]) -> Connector | Answer:
        split = urlsplit(target)
        _, _, party, room, *rest = split.path.split("/", 4)
        name, _, query = split.query.removeprefix("_pk=").partition("&")
        try:
            client = self.kit.connect(
                unquote(room),
                party=party,
                id=unquote(name),
                path="".join(f"/{each}" for each in rest),
                query=query,
                headers=headers,
                subprotocols=subprotocols,
                within=PATIENCE_SECONDS,
            )
        except Refused as refused:
            return Answer(refused.status, refused.response.headers, refused.response.body)
        if self._chance is not None:
            return ShakenConnector(client, self.kit, self._chance)
        return KitConnector(client)

    def _request(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        answer = self.kit.request(method, path, headers=headers, data=body, within=PATIENCE_SECONDS)
        return Answer(answer.status, answer.headers, answer.body)

    def asleep(self, server: type[Server], room: str = "") -> int:
        self.kit.settle()
        view = self.kit.room(self.room(room), kebab(server.__name__))
        assert not view.awake
        return view.constructions

    def ask(self, command: str, **parameters: object) -> Any:
        return self.kit.ask(command, **parameters)

    def pause(self, seconds: float) -> None:
        self.kit.advance(seconds)

    def crash_host(self) -> None:
        self.kit.crash_host()

    def crash_gateway(self) -> None:
        self.kit.crash_gateway()

    def reload(self) -> None:
        self.kit.reload()

    @contextmanager
    def errors(self, *kinds: type[BaseException]) -> Iterator[None]:
        with ExitStack() as stack:
            found: list[Any] = [stack.enter_context(self.kit.expect_error(kind)) for kind in set(kinds)]
            yield
            self.kit.settle()
        assert sorted(type(e).__name__ for each in found for e in each) == sorted(
            kind.__name__ for kind in kinds
        )
