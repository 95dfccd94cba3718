"""What users' type checkers say about programs that use the client."""

import re
from pathlib import Path

import pytest

from tests.typing.test_typing import mypy

CLIENT_CODE = Path(__file__).with_name("client_code.py")

HEAD = "from broker.client import Closed, PartySocket, connect, fetch\n"

# The body of a coroutine, and the code of the error that mypy gives for its only wrong line.
MISTAKES = {
    "an option exists": ("PartySocket('h', 'x', retry_max=3)", "call-arg"),
    "an option has its type": ("PartySocket('h', 'x', retries_max='3')", "arg-type"),
    "there are two protocols": ("PartySocket('h', 'x', protocol='http')", "arg-type"),
    "a query is parameters": ("PartySocket('h', 'x', query='a=1')", "arg-type"),
    "a query function gives parameters": ("PartySocket('h', 'x', query=lambda: 3)", "arg-type"),
    "a predicate takes two": ("PartySocket('h', 'x', should_reconnect=len)", "arg-type"),
    "a socket is entered asynchronously": ("with PartySocket('h', 'x') as s:\n    print(s)", "attr-defined"),
    "messages come asynchronously": ("for m in PartySocket('h', 'x'):\n    print(m)", "attr-defined"),
    "a message is text or bytes": ("print((await PartySocket('h', 'x').receive()).encode())", "union-attr"),
    "an id is read only": ("PartySocket('h', 'x').id = 'ana'", "misc"),
    "retries_max stays": ("PartySocket('h', 'x').update_properties(retries_max=3)", "call-arg"),
    "connect blocks": ("async with connect('h', 'x') as s:\n    print(s)", "attr-defined"),
    "a code may be none": ("print(PartySocket('h').last_close.code)", "union-attr"),
    "an event is no dict": ("def seen(c: Closed) -> None:\n    print(c['code'])", "index"),
    "fetch is awaited": ("print(fetch('h', 'x').status)", "attr-defined"),
}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What mypy says of programs with one mistake each, by the name of the mistake; one run for all."""
    folder = tmp_path_factory.mktemp("mistakes")
    paths = {}
    for number, (name, (body, _)) in enumerate(MISTAKES.items()):
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        paths[name] = folder / f"client_mistake_{number}.py"
        paths[name].write_text(f"{HEAD}\n\nasync def main() -> None:\n{lines}")
    found = mypy(*paths.values())
    return {name: [line for line in found if f"{path.name}:" in line] for name, path in paths.items()}


def test_a_program_with_every_member_passes_strictly():
    assert mypy(CLIENT_CODE) == []


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_seen(name, reports):
    body, code = MISTAKES[name]
    codes = [re.search(r"\[([a-z-]+)\]$", line) for line in reports[name]]
    assert {found and found[1] for found in codes} == {code}, reports[name] or body
