"""What users' type checkers say: nothing about a right app, and the right thing about a wrong one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from broker.app import load_app
from hibernation.hooks import HOOKS

REPOSITORY = Path(__file__).parents[2]
EVERY_HOOK = Path(__file__).with_name("every_hook.py")

HEAD = """\
from broker import Connection, ConnectionContext, Lobby, Refuse, Request, Response, Room, Server
"""

# The body of a class, and the code of the error that mypy gives for its only wrong line.
MISTAKES = {
    "a message is text or bytes": (
        "def on_message(self, message: str | bytes) -> None:\n    print(message.encode())",
        "union-attr",
    ),
    "send needs something": (
        "def on_message(self, message: str | bytes, sender: Connection) -> None:\n    sender.send()",
        "call-arg",
    ),
    "a connection may not be there": (
        "async def on_start(self) -> None:\n    (await self.room.get_connection('a')).send('x')",
        "union-attr",
    ),
    "get_connections is iterated with async for": (
        "async def on_start(self) -> None:\n    for c in self.room.get_connections(): print(c)",
        "attr-defined",
    ),
    "a count is awaited": (
        "def on_start(self) -> None:\n    print(self.room.count_connections() + 1)",
        "operator",
    ),
    "a room has no such member": ("def on_start(self) -> None:\n    self.room.brodcast('x')", "attr-defined"),
    "a close code is a number": (
        "def on_connect(self, connection: Connection) -> None:\n    connection.close('1000')",
        "arg-type",
    ),
    "an id is read only": (
        "def on_connect(self, connection: Connection) -> None:\n    connection.id = 'x'",
        "misc",
    ),
    "tags are given one by one": (
        "def on_connect(self, connection: Connection) -> None:\n    connection.add_tags(['x'])",
        "arg-type",
    ),
    "tags of a filter are named": (
        "def on_start(self) -> None:\n    self.room.broadcast('x', tags=['y'])",
        "call-arg",
    ),
    "rest is text": (
        "def on_request(self, request: Request) -> int:\n    return request.rest",
        "return-value",
    ),
    "a request has Quart's members only": (
        "def on_request(self, request: Request) -> None:\n    print(request.pth)",
        "attr-defined",
    ),
    "a response has no such argument": (
        "def on_request(self, request: Request) -> Response:\n    return Response('x', code=200)",
        "call-arg",
    ),
    "a lobby may have no id": (
        "@staticmethod\ndef on_fetch(request: Request, lobby: Lobby) -> str:\n    return lobby.id",
        "return-value",
    ),
    "a lobby is no room": (
        "@staticmethod\ndef on_fetch(request: Request, lobby: Lobby) -> None:\n    lobby.broadcast('x')",
        "attr-defined",
    ),
    "a refusal has a status": ("@staticmethod\ndef on_fetch() -> None:\n    raise Refuse('no')", "arg-type"),
    "env is not the room's to change": ("def on_start(self) -> None:\n    self.room.env['A'] = 'b'", "index"),
    "hibernate is a bool": ("hibernate = 'yes'", "assignment"),
    "idle_seconds is a number": ("idle_seconds = '3'", "assignment"),
    "concurrency is one of three": ("concurrency = 'parallel'", "assignment"),
    "slow_consumer is one of three": ("slow_consumer = 'drop'", "assignment"),
    "subprotocols are several": ("subprotocols = 'chat'", "assignment"),
    "origins are several": ("origins = 'https://example.com'", "assignment"),
    "tags_max is a whole number": ("tags_max = 1.5", "assignment"),
    "a public name exists": ("from broker import Sever", "attr-defined"),
    "a room is given, not made": ("def on_start(self) -> None:\n    self.room = Room()", "call-arg"),
}


def mypy(*files: Path) -> list[str]:
    """What `mypy --strict` says of these files alone, as for a user who has the broker installed."""
    done = subprocess.run(
        [
            sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent",
            "--no-error-summary", "--hide-error-context", "--no-color-output",
            f"--cache-dir={REPOSITORY / '.mypy_cache' / 'users'}", *map(str, files),
        ],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What mypy says of apps with one mistake each, by the name of the mistake; one run for all."""
    folder = tmp_path_factory.mktemp("mistakes")
    paths = {}
    for number, (name, (body, _)) in enumerate(MISTAKES.items()):
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        paths[name] = folder / f"mistake_{number}.py"
        paths[name].write_text(f"{HEAD}\n\nclass Chat(Server):\n{lines}")
    found = mypy(*paths.values())
    return {name: [line for line in found if path.name in line] for name, path in paths.items()}


def test_an_app_with_every_hook_and_member_passes_strictly():
    assert mypy(EVERY_HOOK) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, reports):
    body, code = MISTAKES[name]
    codes = [re.search(r"\[([a-z-]+)\]$", line) for line in reports[name]]
    assert [found and found[1] for found in codes] == [code], reports[name] or body


def test_the_app_is_no_fiction(monkeypatch):
    """The same file loads, and has every hook that this version calls."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    parties = load_app(str(EVERY_HOOK))
    assert [party.name for party in parties] == ["main", "plain", "uploads"]
    assert parties[0].hooks == set(HOOKS)
    assert parties[1].on_message_parameters == 1
    assert parties[1].specs["on_connect"].parameters == 1
