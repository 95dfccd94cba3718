"""dead-letters, explain: commands about events that ended hosts, and about what a room is doing.

Owns how answers are shown. Looking wakes no room; `replay` does, and `explain --release` may.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from broker.cli.ask import limit_option, listed, plain, print_json
from broker.cli.options import data_option, json_option
from hibernation.admin import AdminClient

__all__ = ["COMMANDS"]

#: A replayed turn may take its time.
REPLAY_SECONDS = 90.0


@click.group("dead-letters")
def dead_letters() -> None:
    """Look at events that ended their host again and again, and run them once more.

    Such an event is given up: its room's `on_error` was told, and the next event went on.
    """


@dead_letters.command("list")
@data_option
@limit_option
@json_option
def list_letters(data: Path, limit: int | None, as_json: bool) -> None:
    """List the dead letters, oldest first in each shard."""
    with AdminClient(data) as client:
        listed(client.pages("dead_letters", "dead_letters"), limit, as_json, "there is no dead letter")


@dead_letters.command()
@click.argument("id")
@data_option
@json_option
def show(id: str, data: Path, as_json: bool) -> None:  # noqa: A002
    """Show all that is kept of the dead letter ID."""
    with AdminClient(data) as client:
        letter = client.ask("dead_letter", id=id)
    if as_json:
        print_json(letter)
    else:
        _show(letter)


@dead_letters.command()
@click.argument("id")
@data_option
@json_option
def replay(id: str, data: Path, as_json: bool) -> None:  # noqa: A002
    """Run the event of the dead letter ID again, in its room and with nothing beside it.

    The letter is deleted when the turn ends well. What it sends to a connection that has gone is dropped.
    If it ends its host again, it stays a dead letter and is not repeated.
    """
    with AdminClient(data, timeout_seconds=REPLAY_SECONDS) as client:
        answer = client.ask("replay", id=id)
    _done(answer, "its turn has ended well, and the letter is deleted", as_json)


@dead_letters.command()
@click.argument("id")
@data_option
@json_option
def delete(id: str, data: Path, as_json: bool) -> None:  # noqa: A002
    """Delete the dead letter ID."""
    with AdminClient(data) as client:
        answer = client.ask("delete_dead_letter", id=id)
    _done(answer, "deleted", as_json)


@click.command()
@click.argument("room")
@click.option("--party", default="main", show_default=True, metavar="NAME")
@click.option("--release", is_flag=True, help="Try to start it again, if it is in quarantine.")
@data_option
@json_option
def explain(room: str, party: str, release: bool, data: Path, as_json: bool) -> None:
    """Say what keeps ROOM awake, or why it does not start."""
    with AdminClient(data) as client:
        facts = client.ask("explain", party=party, room=room, release=release or None)
    if as_json:
        print_json(facts)
        return
    if release:
        click.echo("it is tried again" if facts["released"] else "it is not in quarantine")
    for line in _explained(facts):
        click.echo(line)


def _explained(facts: Mapping[str, Any]) -> list[str]:
    """The answer to `explain`, in words."""
    quarantine = facts["quarantine"]
    if quarantine is not None:
        lines = [f"in quarantine since {_time(quarantine['since'])}: {plain(quarantine['reason'])}"]
        lines.append("new code ends that, and so does: broker explain --release")
    else:
        lines = ["awake" if facts["awake"] else "hibernating"]
    lines += [f"  {plain(reason)}" for reason in facts["reasons"]]
    lines += _alarm_lines(facts)
    lines.append(
        f"{facts['connections']} connections, {facts['in_flight']} events with its host, "
        f"{facts['waiting']} of them waiting"
    )
    return lines


def _alarm_lines(facts: Mapping[str, Any]) -> list[str]:
    """The room's alarms, those that are due first, and those that have failed."""
    count, shown = facts["alarm_count"], facts["alarms"]
    if not count:
        return []
    lines = [f"{count} alarm{'' if count == 1 else 's'}, none of which keeps it awake"]
    for alarm in shown:
        text = f"  {plain(alarm['name'])}: "
        tries = f"{alarm['failures']} run{'' if alarm['failures'] == 1 else 's'}"
        if alarm["failed"]:
            text += f"failed after {tries}: {plain(alarm['reason'])}"
        else:
            text += f"due {_time(alarm['due_at'])}"
            if alarm["failures"]:
                text += f", again after {tries} that failed: {plain(alarm['reason'])}"
        lines.append(text)
    if count > len(shown):
        lines.append(f"  … and {count - len(shown)} more")
    return lines


def _show(letter: Mapping[str, Any]) -> None:
    for name, value in letter.items():
        text = _time(value) if name == "died_at" else plain(value)
        click.echo(f"{name.replace('_', ' ')}: {text}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).astimezone().isoformat(" ", "seconds")


def _done(answer: object, words: str, as_json: bool) -> None:
    if as_json:
        print_json(answer)
    else:
        click.echo(words)


COMMANDS = (explain, dead_letters)
