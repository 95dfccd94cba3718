"""The command line: `broker`.

    options   options that several commands share, and those made from the table of settings
    run       demo, dev, serve: they start an instance and stay until it stops
    ask       rooms, connections, stats: they ask a running instance, and wake nothing (S42)
    act       broadcast, send, kick, reload, upgrade, drain, stop: they have a running instance do something
    blame     explain, dead-letters: why a room is awake, what ended hosts

Exit status 0 for success, 1 for a failure, 2 for a mistake in what was typed or in the app. What goes wrong
is said in words on standard error, never as a traceback.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from broker.cli import act, ask, blame, run
from hibernation.errors import AppError, SettingError
from hibernation.listener import StartError
from storage.errors import BrokerError

__all__ = ["cli", "main"]


class _Group(click.Group):
    """Lists its commands in the order of use, and says errors of ours as click says its own."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokerError as error:
            usage = isinstance(error, AppError | SettingError) or (
                isinstance(error, StartError) and error.usage
            )
            raise (_Mistake if usage else click.ClickException)(str(error)) from error


class _Mistake(click.ClickException):
    """What was typed, or the app, is wrong."""

    exit_code = 2


def _version() -> str:
    try:
        return version("broker")
    except PackageNotFoundError:
        return "0 (not installed)"


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), prog_name="broker")
def cli() -> None:
    """Hold very many WebSockets, and run each room's code only while there is something for it to do."""


for _command in (*run.COMMANDS, *ask.COMMANDS, *act.COMMANDS, *blame.COMMANDS):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its status; `arguments` are the process's own by default."""
    cli.main(args=None if arguments is None else list(arguments), prog_name="broker")
