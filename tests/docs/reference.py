"""The parts of the reference that are made from the code: settings, commands, statistics.

Owns the text between the marks `<!-- made from the code: NAME -->` and `<!-- end -->` in docs/reference.
`python -m tests.docs.reference` writes it anew; `test_docs` fails while it differs. Whatever stands outside
the marks is written by hand.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click

from broker.cli import cli
from broker.cli.options import SettingOption
from hibernation.settings import SETTINGS

__all__ = ["DOCS", "PARTS", "parts_of", "written"]

DOCS = Path(__file__).resolve().parents[2] / "docs"

_PART = re.compile(r"<!-- made from the code: ([\w ]+) -->\n(.*?)<!-- end -->", re.DOTALL)


def settings_table(scope: str) -> str:
    """One row for each setting of a scope: name, default, what is allowed, what it does."""
    rows = ["| setting | default | allowed | |", "| --- | --- | --- | --- |"]
    for setting in SETTINGS:
        if setting.scope == scope:
            cells = (f"`{setting.name}`", setting.default_text, setting.allowed_text, setting.doc)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def command_reference() -> str:
    """A section for each command: how it is written, what it does, its own options."""
    return "\n".join(_sections("", cli.commands))


def _sections(before: str, commands: Mapping[str, click.Command]) -> Iterator[str]:
    for name, command in commands.items():
        yield _section(before + name, command)
        if isinstance(command, click.Group):
            yield from _sections(f"{before}{name} ", command.commands)


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"broker {name}", parent=None)
    given = [p for p in command.params if not isinstance(p, SettingOption)]
    arguments = " ".join(p.make_metavar(context) for p in given if isinstance(p, click.Argument))
    lines = [f"## broker {name}", "", f"`broker {name} {arguments}`".replace(" `", "`"), ""]
    lines.append("\n\n".join([" ".join(part.split()) for part in (command.help or "").split("\n\n")]))
    options = [p for p in given if isinstance(p, click.Option)]
    if options:
        lines += ["", "| option | default | |", "| --- | --- | --- |"]
    lines += [_row(option, context) for option in options]
    if any(isinstance(p, SettingOption) for p in command.params):
        lines += ["", "and an option for each of the [settings](settings.md)."]
    return "\n".join(lines) + "\n"


def _row(option: click.Option, context: click.Context) -> str:
    shown = ", ".join(option.opts)
    if not option.is_flag:
        is_number = isinstance(option.type, click.types.IntParamType)
        shown += " N" if is_number else f" {option.make_metavar(context)}"
    default = f"`{option.default}`" if option.default and type(option.default) in (str, int) else ""
    return " ".join(f"| `{shown}` | {default} | {option.help or _UNSAID[option.opts[0]]} |".split())


_UNSAID = {"--party": "The party of the room."}
"""What the command line leaves unsaid."""


PARTS: dict[str, Callable[[], str]] = {
    "settings of rooms": lambda: settings_table("room"),
    "settings of the instance": lambda: settings_table("instance"),
    "commands": command_reference,
}


def parts_of(text: str) -> dict[str, str]:
    """The made parts of a page as they stand there, by name."""
    return dict(_PART.findall(text))


def written(text: str) -> str:
    """The page with its made parts as they should be."""

    def fresh(match: re.Match[str]) -> str:
        name = match[1]
        return f"<!-- made from the code: {name} -->\n{PARTS[name]()}<!-- end -->"

    return _PART.sub(fresh, text)


if __name__ == "__main__":
    for page in DOCS.rglob("*.md"):
        page.write_text(written(page.read_text()))
