"""The docs say what the code does: names, bounds and codes are compared, and what is shown is run."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import broker
from broker import (
    Alarm,
    Connection,
    ConnectionContext,
    Cron,
    Lobby,
    OtherRoom,
    PartyRooms,
    Room,
    Server,
    Storage,
)
from broker.gateway import frames
from hibernation.hooks import HOOKS
from hibernation.settings import ROOM_SETTINGS
from tests.docs.pages import Reader, blocks_of
from tests.docs.reference import DOCS, PARTS, parts_of, written
from tests.e2e.broker_process import BrokerProcess

ROOT = DOCS.parent
README = ROOT / "README.md"
TUTORIAL = DOCS / "tutorial.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
SOURCES = [path for name in ("broker", "hibernation", "storage") for path in (ROOT / name).rglob("*.py")]
GATEWAY = sorted((ROOT / "broker" / "gateway").glob("*.py"))
ANSWERING = [*GATEWAY, ROOT / "hibernation" / "exchanges.py"]


def page(name: str) -> str:
    return (DOCS / "reference" / name).read_text()


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, heading
    return found[1]


def first_cells(text: str) -> set[str]:
    """The names in the first column of every table."""
    rows = re.findall(r"^\| (.+?) \|", text, re.MULTILINE)
    names = {name for row in rows for name in re.findall(r"`?([\w.]+)`?", row)}
    return names - {"setting", "option", "name", "code", "cause", "status", "error", "attribute"}


# --- The reference against the code -------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_made_parts_are_up_to_date(path: Path) -> None:
    assert path.read_text() == written(path.read_text()), "run python -m tests.docs.reference"


def test_every_made_part_stands_in_one_page() -> None:
    found = [name for path in PAGES for name in parts_of(path.read_text())]
    assert sorted(found) == sorted(PARTS)


def test_every_hook_is_described_with_its_parameters() -> None:
    text = page("hooks.md")
    described = dict(re.findall(r"^### (\w+)\n\n`\w+\((.*)\)`$", text, re.MULTILINE))
    assert described == {
        name: ", ".join(hook.parameters if hook.static else ("self", *hook.parameters))
        for name, hook in HOOKS.items()
    }
    for name in HOOKS:
        assert section(text, f"### {name}"), name


def test_the_example_of_all_hooks_is_a_party() -> None:
    [block] = [block for block in blocks_of(DOCS / "reference" / "hooks.md") if block.language == "python"]
    names: dict[str, object] = {"__name__": "example"}
    exec(block.text, names)
    chat = names["Chat"]
    assert isinstance(chat, type) and issubclass(chat, Server)
    assert {name for name in vars(chat) if name in HOOKS} == set(HOOKS)


@pytest.mark.parametrize(
    "cls", [Room, Connection, Storage, Alarm, ConnectionContext, Lobby, PartyRooms, OtherRoom, Cron]
)
def test_every_member_is_described(cls: type) -> None:
    described = re.findall(
        r"(?:^|, |\. )`(?:await |async for connection in )?(\w+)(?:\(.*?\))?`(?=(?:, `\w+.*)? –)",
        section(page("room.md"), f"## {cls.__name__}"),
        re.MULTILINE,
    )
    members = {name for name, _ in inspect.getmembers(cls) if not name.startswith("_")}
    members |= {name for name in getattr(cls, "__annotations__", {}) if not name.startswith("_")}
    assert set(described) == members


def test_parameters_of_members_are_as_they_are() -> None:
    for cls in (Room, Connection, PartyRooms, OtherRoom):
        text = section(page("room.md"), f"## {cls.__name__}")
        for name, parameters in re.findall(
            r"^`(?:await |async for connection in )?(\w+)\(([^`]*)\)` –", text, re.M
        ):
            signature = inspect.signature(getattr(cls, name))
            wanted = str(
                signature.replace(
                    parameters=[
                        p.replace(annotation=p.empty) for p in list(signature.parameters.values())[1:]
                    ],
                    return_annotation=signature.empty,
                )
            )
            assert f"({parameters})".replace('"', "'") == wanted, name


def test_every_error_is_described() -> None:
    raised = {
        name
        for name in broker.__all__
        if isinstance(kind := getattr(broker, name), type) and issubclass(kind, BaseException)
    }
    assert first_cells(section(page("room.md"), "## Errors")) == raised


def test_every_class_attribute_is_described() -> None:
    declared = set(Server.__annotations__) - {"room"}
    plain = declared - {setting.name for setting in ROOM_SETTINGS}
    assert first_cells(section(page("settings.md"), "## On a class only")) == plain


def called_with(paths: list[Path], functions: set[str]) -> Iterator[tuple[ast.Call, list[object]]]:
    """Every call of these functions, with its constant arguments; names of `frames` count as constants."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if name in functions:
                    values = [
                        part.value if isinstance(part, ast.Constant) else getattr(frames, part.id, None)
                        for argument in node.args
                        for part in ast.walk(argument)
                        if isinstance(part, ast.Constant | ast.Name)
                    ]
                    yield node, values


def test_every_close_code_is_described() -> None:
    functions = {"close", "Violation", "violated", "Ending", "encode_close", "turn_away_open"}
    used = {
        value
        for _, values in called_with(GATEWAY, functions)
        for value in values
        if type(value) is int and 1000 <= value <= 4999
    }
    text = page("close-codes.md")
    sent = first_cells(section(text, "## Close codes that the broker sends"))
    told = first_cells(section(text, "## What `on_close` is told"))
    assert {int(code) for code in sent | told} == used | {frames.NO_CODE, frames.NORMAL}
    assert sent.isdisjoint(told)
    assert all(frames.sendable(int(code)) for code in sent)


def test_every_status_is_described() -> None:
    functions = {
        "HeadError",
        "RequestRefused",
        "HttpReply",
        "Reply",
        "_page",
        "_refuse",
        "error_response",
    }
    used = {
        value
        for _, values in called_with(ANSWERING, functions)
        for value in values
        if type(value) is int and 200 <= value <= 599
    }
    text = section(page("close-codes.md"), "## HTTP statuses that the broker answers with")
    # 101 is written by `switching_response`.
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)} == used | {101}


def test_every_cause_is_described() -> None:
    constants = {
        node.value
        for path in GATEWAY
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    source = inspect.getsource(Connection)
    listed = re.search(r"in `on_close`: ([\w, #:\n]+?)\. None while", source)
    assert listed is not None
    causes = set(re.findall(r"[a-z_]+", listed[1])) - {"or"}
    described = first_cells(section(page("close-codes.md"), "## Causes"))
    assert described == causes
    assert described <= constants


INVARIANT = re.compile(r"\b([A-Z]\d+)  \S")


def test_the_page_of_invariants_lists_those_of_the_modules() -> None:
    found: dict[str, str] = {}
    for path in SOURCES:
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        for number in INVARIANT.findall(docstring.partition("Invariants")[2]):
            assert number not in found, number
            found[number] = path.relative_to(ROOT).as_posix()
    text = (DOCS / "invariants.md").read_text()
    listed: dict[str, str] = {}
    for path, rest in re.findall(r"^## .*?`(\S+\.py)`\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE):
        listed |= dict.fromkeys(re.findall(r"^\| ([A-Z]\d+) \|", rest, re.MULTILINE), path)
    assert listed == found


def test_invariants_that_are_cited_exist() -> None:
    known = set(re.findall(r"^\| ([A-Z]\d+) \|", (DOCS / "invariants.md").read_text(), re.MULTILINE))
    for path in [*SOURCES, *PAGES]:
        cited = set(re.findall(r"\b([CDFHKLO]\d)\b", path.read_text()))
        assert cited <= known, path


def test_every_rule_that_is_cited_exists() -> None:
    known = re.findall(r"^\| (S\d+) \|", (DOCS / "rules.md").read_text(), re.MULTILINE)
    assert known == sorted(set(known), key=lambda rule: int(rule[1:]))
    cited = {rule for path in SOURCES for rule in re.findall(r"\bS\d{1,2}\b", path.read_text())}
    assert cited <= set(known)


# --- The pages themselves -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
        waiting += [(path.parent / target).resolve() for target in targets]
    assert reached >= set(DOCS.rglob("*.md"))


def test_decisions_are_numbered_and_have_their_parts() -> None:
    decisions = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    assert [path.name[:4] for path in decisions] == [f"{n:04}" for n in range(1, len(decisions) + 1)]
    for path in decisions:
        headings = re.findall(r"^## (.*)$", path.read_text(), re.MULTILINE)
        assert headings == ["Context", "Choice", "Rejected", "What follows"], path.name


def test_the_room_of_the_readme_has_20_lines_at_most() -> None:
    [room] = [block.text for block in blocks_of(README) if block.file == "chat.py"]
    assert len([line for line in room.splitlines() if line]) <= 20


# --- What is shown is run -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Reader, BrokerProcess]]:
    folder, clients = tmp_path_factory.mktemp("app"), tmp_path_factory.mktemp("clients")
    [env] = [block.text for block in blocks_of(TUTORIAL) if block.file == ".env"]
    (folder / ".env").write_text(env)
    [room] = [block.text for block in blocks_of(README) if block.file == "chat.py"]
    with BrokerProcess(folder, room, command="dev") as process:
        yield Reader(process, clients), process


@pytest.mark.e2e
def test_the_readme_is_true(reader: tuple[Reader, BrokerProcess]) -> None:
    assert reader[0].follow(README) == 2


@pytest.mark.e2e
@pytest.mark.timeout(600)  # a dozen reloads and two dozen programs
def test_the_tutorial_is_true(reader: tuple[Reader, BrokerProcess]) -> None:
    assert reader[0].follow(TUTORIAL) >= 10
    assert "new code does not load" not in reader[1].log


@pytest.mark.e2e
def test_every_statistic_is_described(reader: tuple[Reader, BrokerProcess]) -> None:
    text = section(page("commands.md"), "## What `broker stats` shows")
    assert first_cells(text) == {*reader[1].stats(), "keepers", "spares"}
