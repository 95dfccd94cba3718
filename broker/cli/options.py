"""Options that several commands share, and those made from the table of settings.

Owns how a setting becomes an option; which settings there are, and what they may be, is
`hibernation.settings`' alone. Its peers are the commands beside it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from hibernation.settings import SETTINGS, Setting

__all__ = [
    "DEFAULT_DATA",
    "SettingsCommand",
    "data_option",
    "json_option",
    "settings_options",
    "split_settings",
    "variables_option",
]

DEFAULT_DATA = ".broker"

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

F = TypeVar("F", bound=Callable[..., Any])


class SettingOption(click.Option):
    """An option made from a line of the table of settings."""


class SettingsCommand(click.Command):
    """A command whose help lists the settings apart from its own options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write both lists."""
        own: list[tuple[str, str]] = []
        settings: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                (settings if isinstance(parameter, SettingOption) else own).append(record)
        with formatter.section("Options"):
            formatter.write_dl(own)
        with formatter.section("Settings (each also as a variable: --idle-seconds is BROKER_IDLE_SECONDS)"):
            formatter.write_dl(settings)


def settings_options(command: F) -> F:
    """Add an option for each setting; its value is None when it was not given, else the text."""
    for setting in reversed(SETTINGS):
        option = click.option(
            setting.option,
            setting.name,
            cls=SettingOption,
            default=None,
            metavar=_metavar(setting),
            help=f"{setting.doc}  [{setting.default_text}]",
        )
        command = option(command)
    return command


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(setting.choices)
    return {"origins": "ORIGIN,…", "networks": "NETWORK,…"}.get(
        setting.kind, (setting.unit or "number").upper()
    )


def split_settings(given: Mapping[str, Any]) -> dict[str, object]:
    """Give those of a command's arguments that are settings."""
    names = {setting.name for setting in SETTINGS}
    return {name: value for name, value in given.items() if name in names}


def _read_variables(
    _context: click.Context, _parameter: click.Parameter, given: Iterable[str]
) -> dict[str, str]:
    variables: dict[str, str] = {}
    for item in given:
        name, equals, value = item.partition("=")
        if not equals or not _NAME.fullmatch(name):
            # The text may be a secret, so it is not shown.
            raise click.BadParameter("give NAME=VALUE; a name has letters, digits and _ only")
        variables[name] = value
    return variables


variables_option = click.option(
    "--var",
    "variables",
    multiple=True,
    callback=_read_variables,
    metavar="NAME=VALUE",
    help="A value for room.env, over .env beside the app; may be repeated.",
)

data_option = click.option(
    "--data",
    type=click.Path(file_okay=False, path_type=Path),
    default=DEFAULT_DATA,
    show_default=True,
    metavar="DIR",
    help="The data directory, which names the instance.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
