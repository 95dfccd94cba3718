"""broadcast, send, kick, reload, upgrade, drain, stop: commands that have a running instance do something.

Owns their options and words. None of them wakes a room (S2), but that connections which `drain` and `stop`
close have their `on_close`.
"""

from pathlib import Path

import click

from broker.cli.ask import plain, print_json
from broker.cli.options import data_option, json_option
from hibernation.admin import AdminClient, SupervisorClient
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
def reload(data: Path, as_json: bool) -> None:
    """Have the hosts run the code as it is now. No socket closes.

    If it does not load, nothing is changed. Returns when the new code answers for every room.
    """
    with SupervisorClient(data) as client:
        answer = client.ask("reload")
    words = f"{_numbered(answer['hosts'], 'host')} with new code, in {answer['seconds']:.1f} s"
    for name in answer["gone_parties"]:
        words += f"\nparty {plain(name)} is gone: its rooms keep connections and storage, and run no code"
    _done(answer, words, as_json)


@click.command()
@data_option
@json_option
def upgrade(data: Path, as_json: bool) -> None:
    """Replace the gateway by one of the broker as it is installed now. No socket closes.

    If that fails, the old one goes on. The hosts are replaced by reload.
    """
    with SupervisorClient(data) as client:
        answer = client.ask("upgrade")
    pause_ms = answer["pause_seconds"] * 1000
    _done(answer, f"gateway replaced (process {answer['gateway']}), pause {pause_ms:.0f} ms", as_json)


@click.command()
@click.option(
    "--seconds",
    type=click.FloatRange(0, 3600),
    default=None,
    metavar="N",
    help="Spread the closes over N seconds.",
)
@data_option
@json_option
def drain(seconds: float | None, data: Path, as_json: bool) -> None:
    """Close every connection with 1012, and take no new ones.

    The closes are spread over the setting drain, unless --seconds says otherwise. The instance stays up,
    empty, until it is stopped.
    """
    with SupervisorClient(data) as client:
        answer = client.ask("drain", seconds=seconds)
    _done(answer, "drained", as_json)


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


def _numbered(pids: list[int], what: str) -> str:
    several = "s" if len(pids) > 1 else ""
    return f"{len(pids)} {what}{several} (process {', '.join(str(pid) for pid in pids)})"


def _counted(connections: object) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


COMMANDS = (broadcast, send, kick, reload, upgrade, drain, stop)
