"""docs/reference/client.md says what `broker.client` does: names, defaults, bounds, signatures."""

import inspect
import re
import typing
from dataclasses import fields

import pytest

import broker.client
from broker.client import BlockingSocket, PartySocket, State
from broker.client.options import _FLOATS, _WHOLE, MIB, AddressOptions, Options
from hibernation.errors import BrokerError
from tests.docs.pages import blocks_of
from tests.docs.reference import DOCS
from tests.docs.test_docs import section

PAGE = DOCS / "reference" / "client.md"
TEXT = PAGE.read_text()


def rows(text: str) -> list[list[str]]:
    """The cells of every row of a table below its head."""
    found = [re.split(r" *\| *", line.strip())[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return [cells for cells in found if cells[0].startswith("`")]


def shown(value: object, unit: str) -> str:
    """A default as the page writes it."""
    if unit == "bytes":
        return f"{value // MIB} MiB"  # type: ignore[operator]
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def number(value: float) -> str:
    for power, text in ((10**9, "10^9"), (2**40, "2^40")):
        if value == power:
            return text
    return f"{value:,.2f}".removesuffix("0").removesuffix(".0") if value % 1 else f"{value:,.0f}"


def test_every_option_is_described_with_its_default() -> None:
    addresses = {cells[0].strip("`") for cells in rows(section(TEXT, "## Addresses"))}
    assert addresses == {"host", "room", *AddressOptions.__annotations__}
    described = {cells[0].strip("`"): cells[1:3] for cells in rows(section(TEXT, "## Options"))}
    defaults = {field.name: field.default for field in fields(Options) if field.name not in addresses}
    assert set(described) == set(defaults)
    bounds = {**_FLOATS, **_WHOLE}
    for name, value in defaults.items():
        default, allowed = described[name]
        if name in bounds:
            low, high, unit = bounds[name]
            assert default == shown(value, unit), name
            least = "`delay_min_seconds`" if name == "delay_max_seconds" else number(low)
            assert allowed == f"{least} to {number(high)}", name
        elif not callable(value):
            assert default == str(value), name


@pytest.mark.parametrize("cls", [PartySocket, BlockingSocket])
def test_every_member_is_described(cls: type) -> None:
    described = set()
    for line in section(TEXT, f"## {cls.__name__}").split("\n\n"):
        head, dash, _ = line.partition(" – ")
        if dash and head.startswith("`"):
            described |= set(re.findall(r"`(?:await )?(\w+)(?=[(`])", head))
    members = {name for name, _ in inspect.getmembers(cls) if not name.startswith("_")}
    assert described == members


@pytest.mark.parametrize(
    ("owner", "heading"),
    [
        (PartySocket, "## PartySocket"),
        (BlockingSocket, "## BlockingSocket"),
        (broker.client, "## connect"),
        (broker.client, "## fetch"),
    ],
)
def test_parameters_are_as_they_are(owner: object, heading: str) -> None:
    text = " ".join(section(TEXT, heading).split())
    count = 0
    for awaited, name, parameters in re.findall(r"`(await )?(\w+)\(([^`]*)\)`(?=,| –)", text):
        if name in ("PartySocket", "FetchResponse", "json", "header"):
            continue
        function = getattr(owner, name)
        signature = inspect.signature(function)
        kept = [p for p in signature.parameters.values() if p.name != "self"]
        plain = [
            p.replace(annotation=p.empty, name="options" if p.kind is p.VAR_KEYWORD else p.name) for p in kept
        ]
        wanted = str(signature.replace(parameters=plain, return_annotation=signature.empty))
        assert f"({parameters})".replace('"', "'") == wanted, name
        assert bool(awaited) is inspect.iscoroutinefunction(function), name
        count += 1
    assert count


def test_every_public_name_is_described() -> None:
    for name in broker.client.__all__:
        if name not in ("Event", "SocketOptions", "reconnect_after_every_close"):
            assert re.search(rf"`(?:await )?{name}\b|# {name}\b|{name} =|\b{name}\(", TEXT), name
    assert all(hasattr(broker.client, name) for name in broker.client.__all__)


def test_every_error_and_state_is_described() -> None:
    errors = {
        name
        for name in broker.client.__all__
        if isinstance(kind := getattr(broker.client, name), type) and issubclass(kind, BrokerError)
    }
    assert {cells[0].strip("`") for cells in rows(section(TEXT, "## Errors"))} == errors
    states = {cells[0].strip("`") for cells in rows(section(TEXT, "## States"))}
    assert states == {f"State.{state.name}" for state in State}


def test_fields_of_events_are_as_they_are() -> None:
    for cls in (broker.client.Opened, broker.client.Closed, broker.client.FetchResponse):
        names = ", ".join(field.name for field in fields(cls))
        assert f"`{cls.__name__}({names})` –" in TEXT


def test_the_options_for_type_checkers_are_those_that_are_checked() -> None:
    given = typing.get_type_hints(broker.client.SocketOptions)
    checked = typing.get_type_hints(Options)
    assert {name: checked[name] for name in given} == given


def test_the_examples_compile() -> None:
    for block in blocks_of(PAGE):
        if block.language == "python":
            compile(block.text, "client.md", "exec")
