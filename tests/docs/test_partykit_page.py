"""docs/partykit.md says what is the same here and what is not: its Python is run, its names exist."""

import re
from pathlib import Path

import pytest

import broker
from broker import Connection, Lobby, OtherRoom, Room, Server, Storage
from hibernation.hooks import HOOKS
from hibernation.settings import SETTINGS
from tests.docs.pages import blocks_of
from tests.docs.reference import DOCS
from tests.docs.test_testing_page import run_pytest

PAGE = DOCS / "partykit.md"


@pytest.mark.timeout(300)  # a run of pytest
def test_the_server_in_python_does_what_the_page_says(tmp_path: Path) -> None:
    for block in blocks_of(PAGE):
        if block.language == "python":
            (tmp_path / block.file).write_text(block.text)
    status, output = run_pytest(tmp_path)
    assert status == 0, output
    assert "3 passed" in output, output


def test_both_servers_have_the_same_hooks() -> None:
    texts = {block.language: block.text for block in blocks_of(PAGE) if block.file != "test_auction.py"}
    there = re.findall(r"^  (?:static )?(?:async )?(on\w+|get\w+)\(", texts["ts"], re.MULTILINE)
    here = re.findall(r"^    (?:async )?def (on_\w+|get_\w+)\(", texts["python"], re.MULTILINE)
    assert [re.sub(r"[A-Z]", lambda letter: f"_{letter[0].lower()}", name) for name in there] == here


def test_every_hook_is_there() -> None:
    text = PAGE.read_text()
    for name, hook in HOOKS.items():
        parameters = ", ".join(hook.parameters if hook.static else ("self", *hook.parameters))
        assert f"{name}({parameters})" in text, name


def test_names_of_this_side_exist() -> None:
    """The last cell of each row is ours: what is called or set in it is there, with these keywords."""
    text = PAGE.read_text()
    rows = re.findall(r"^\|.*\|$", text, re.MULTILINE)
    ours = " ".join(re.split(r"(?<!\\) \| ", row)[-1] for row in rows)
    settings = {setting.name for setting in SETTINGS}
    owners = {"storage": Storage, "room": Room, "connection": Connection, "lobby": Lobby}
    found = re.findall(r"\b(storage|room|connection|lobby)\.([a-z_]+)\b", ours)
    assert len(found) > 25
    for owner, name in found:
        kinds = {Room, OtherRoom} if owner == "room" else {owners[owner]}
        members = {each for kind in kinds for each in {*dir(kind), *getattr(kind, "__annotations__", {})}}
        assert name in members, (owner, name)
    for name in re.findall(r"\(`(\w+)`\)", ours):
        assert name in settings, name
    for name in re.findall(r"`(\w+) = ", ours):
        assert name in Server.__annotations__ or name in HOOKS, name
    assert hasattr(broker, "mount") and hasattr(broker, "Refuse")


def test_limits_are_those_of_the_settings() -> None:
    defaults = {setting.name: setting.default_text for setting in SETTINGS}
    text = PAGE.read_text()
    shown = [*re.findall(r"`(\w+)` \[([^\]]+)\]", text)]
    assert len(shown) >= 4
    short = {"seconds": "s"}
    for name, value in shown:
        number, _, unit = defaults[name].partition(" ")
        assert value == f"{number} {short.get(unit, unit)}".strip(), name
    for value, name in re.findall(r"\| ([\d,]+(?: [KMG]iB)?) \(`(\w+)`\)", text):
        assert defaults[name] == value, name
