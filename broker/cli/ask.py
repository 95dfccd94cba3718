"""rooms, connections, stats: commands that ask a running instance, and wake no room (S2, S42).

Owns how answers are shown. What a client or an app has chosen (ids, tags, addresses) is shown with its
control characters escaped: it must not be able to write to the operator's terminal.
"""

import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker.cli.options import data_option, json_option
from hibernation.admin import AdminClient, processes_of, supervisor_of

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["COMMANDS", "limit_option", "listed", "plain", "print_json"]

PIPED_WIDTH_COLUMNS = 240
"""A table that goes to a file or a pipe is not to be broken at 80 columns."""

ROWS_SHOWN = 1000
"""A table of more rows is cut, and says so; --json gives all, and --limit another number."""

_PROCESSES = ("supervisor", "gateways", "keepers", "hosts", "silent_hosts", "spares")

limit_option = click.option(
    "--limit", type=click.IntRange(min=1), default=None, metavar="N", help="Show no more than N."
)


@click.command()
@data_option
@click.option("--party", metavar="NAME", help="Only the rooms of this party.")
@limit_option
@json_option
def rooms(data: Path, party: str | None, limit: int | None, as_json: bool) -> None:
    """List the rooms that have connections or events on their way."""
    with AdminClient(data) as client:
        nothing = "no such room has a connection" if party else "no room has a connection"
        listed(client.pages("rooms", "rooms", party=party), limit, as_json, nothing)


@click.command()
@data_option
@click.option("--party", metavar="NAME", help="Only those of this party's rooms.")
@click.option("--room", metavar="ID", help="Only those of this room.")
@click.option("--tag", metavar="TAG", help="Only those with this tag.")
@click.option("--id", "id_", metavar="ID", help="Only the connection with this id.")
@limit_option
@json_option
def connections(
    data: Path,
    party: str | None,
    room: str | None,
    tag: str | None,
    id_: str | None,
    limit: int | None,
    as_json: bool,
) -> None:
    """List the open connections, in the order in which they were accepted."""
    with AdminClient(data) as client:
        rows = client.pages("connections", "connections", party=party, room=room, tag=tag, id=id_)
        filtered = any(wanted is not None for wanted in (party, room, tag, id_))
        listed(rows, limit, as_json, "no such connection" if filtered else "no connection is open")


@click.command()
@data_option
@json_option
def stats(data: Path, as_json: bool) -> None:
    """Show what the instance is doing, in numbers."""
    with AdminClient(data) as client:
        given = client.ask("stats")
    # A gateway outlives its supervisor, and would name whoever is its parent then.
    keepers, spares = processes_of(data, "keeper"), processes_of(data, "spare")
    given = {**given, "supervisor": supervisor_of(data), "keepers": keepers, "spares": spares}
    if as_json:
        print_json(given)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    host, port = given.get("address") or ("-", "-")
    for name, value in _flat({**given, "address": f"{host}:{port}"}):
        table.add_row(Text(name), Text(_counted(value) if name not in _PROCESSES else plain(value)))
    _console().print(table)


def listed(rows: Iterable[Mapping[str, Any]], limit: int | None, as_json: bool, nothing: str) -> None:
    """Show a listing: as JSON, as a table, or `nothing`."""
    if as_json:
        print_json(list(islice(rows, limit)))
        return
    shown = limit or ROWS_SHOWN
    taken = list(islice(rows, shown + 1))
    if not taken:
        click.echo(nothing)
        return
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for row in taken for name in row))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        numbers = all(isinstance(row.get(name), int | float | None) for row in taken) and name[-3:] != "_at"
        table.add_column(name.replace("_", " "), justify="right" if numbers else "left", overflow="fold")
    for row in taken[:shown]:
        table.add_row(*(Text(_cell(name, row.get(name))) for name in names))
    _console().print(table)
    if len(taken) > shown:
        click.echo(f"… more than {shown}: --limit N shows more, --json all")


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPED_WIDTH_COLUMNS)


def _flat(given: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in given.items():
        shown = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{shown} ")
        else:
            yield shown, value


def _counted(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else plain(value)


def _cell(name: str, value: object) -> str:
    if name.endswith("_at") and isinstance(value, int | float):
        return datetime.fromtimestamp(value, UTC).astimezone().isoformat(" ", "seconds")
    return plain(value)


def plain(value: object) -> str:
    """Give a value as text for a terminal: no control characters, whoever chose them."""
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        case list() | tuple() | set() | frozenset():
            return ", ".join(plain(item) for item in value) or "-"
        case Mapping():
            return ", ".join(f"{plain(key)}={plain(item)}" for key, item in value.items()) or "-"
        case bytes():
            return f"{len(value)} bytes"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value))


def print_json(value: object) -> None:
    """Print a value as JSON, bytes as their hexadecimal digits."""
    click.echo(json.dumps(value, indent=2, default=_for_json))


def _for_json(value: object) -> object:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, set | frozenset):
        return sorted(value)
    return str(value)


COMMANDS = (rooms, connections, stats)
