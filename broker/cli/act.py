"""broadcast, send, kick, stop: commands that have a running instance do something.

Owns their options and words. None of them wakes a room (S2).
"""

from pathlib import Path

import click

from broker.cli.ask import print_json
from broker.cli.options import data_option, json_option
from hibernation.admin import AdminClient
from hibernation.admin import stop as stop_instance

__all__ = ["COMMANDS"]

_party_option = click.option("--party", default="main", show_default=True, metavar="NAME")


@click.command()
@click.argument("room")
@click.argument("message")
@_party_option
@click.option("--tag", metavar="TAG", help="Only to connections with this tag.")
@data_option
@json_option
def broadcast(room: str, message: str, party: str, tag: str | None, data: Path, as_json: bool) -> None:
    """Send the text MESSAGE to all connections of ROOM."""
    with AdminClient(data) as client:
        answer = client.ask("broadcast", party=party, room=room, message=message, tag=tag)
    _done(answer, f"sent to {_counted(answer.get('sent'))}", as_json)


@click.command()
@click.argument("room")
@click.argument("id")
@click.argument("message")
@_party_option
@data_option
@json_option
def send(room: str, id: str, message: str, party: str, data: Path, as_json: bool) -> None:  # noqa: A002
    """Send the text MESSAGE to the connection ID of ROOM."""
    with AdminClient(data) as client:
        answer = client.ask("send", party=party, room=room, id=id, message=message)
    _done(answer, "sent", as_json)


@click.command()
@click.argument("room")
@click.argument("id")
@click.option(
    "--code", type=click.IntRange(1000, 4999), default=1000, show_default=True, help="The close code."
)
@click.option("--reason", default="", metavar="TEXT", help="At most 123 bytes of UTF-8.")
@_party_option
@data_option
@json_option
def kick(
    room: str,
    id: str,  # noqa: A002
    code: int,
    reason: str,
    party: str,
    data: Path,
    as_json: bool,
) -> None:
    """Close the connection ID of ROOM."""
    with AdminClient(data) as client:
        answer = client.ask("kick", party=party, room=room, id=id, code=code, reason=reason)
    _done(answer, "closed", as_json)


@click.command()
@data_option
@json_option
def stop(data: Path, as_json: bool) -> None:
    """Drain and stop the instance. A second one forces."""
    pids = stop_instance(data)
    if as_json:
        print_json({"stopped": pids})
    else:
        click.echo(f"stopped (process {', '.join(str(pid) for pid in pids)})")


def _done(answer: object, words: str, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(words)


def _counted(connections: object) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


COMMANDS = (broadcast, send, kick, stop)
