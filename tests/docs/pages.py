"""The code in Markdown pages, and how it is run as a reader runs it.

A fence's info string says what becomes of the block: `python NAME` and `text NAME` are files to save,
`console` holds commands behind `$` and what they print, where `...` stands for anything. Other fences are
shown and not run. A file called `chat.py` is the app, which the running `broker dev` loads when it is saved;
all others are kept in a folder of their own, since saving them beside the app would reload it for nothing.
"""

import doctest
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.broker_process import DEADLINE_SECONDS, ROOT, BrokerProcess, eventually

__all__ = ["Block", "Reader", "blocks_of"]

PORT_IN_PAGES = 1999

_CHECKER = doctest.OutputChecker()
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

_FENCE = re.compile(r"^```(\S*)[ \t]*(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file it is to be saved as ("": none), its text."""

    language: str
    file: str
    text: str

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Of a console block: each command with what it prints."""
        pieces = re.split(r"^\$ ", self.text, flags=re.MULTILINE)
        assert not pieces[0], "a console block begins with a command"
        return [(command, output) for command, _, output in (piece.partition("\n") for piece in pieces[1:])]


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    return [Block(*found) for found in _FENCE.findall(page.read_text())]


class Reader:
    """Does what a page says, one block after the other, with a `broker dev` that runs `app.py`."""

    def __init__(self, broker: BrokerProcess, folder: Path) -> None:
        self._broker = broker
        self._folder = folder

    def follow(self, page: Path) -> int:
        """Save and run every block; returns how many commands were run."""
        count = 0
        for block in blocks_of(page):
            if block.file == "chat.py":
                self._save_app(block.text)
            elif block.language == "python" and block.file:
                (self._folder / block.file).write_text(self._here(block.text))
            elif block.language == "console":
                for command, expected in block.commands:
                    self._check(command, expected)
                    count += 1
        return count

    def _save_app(self, text: str) -> None:
        if text == self._broker.app_file.read_text():
            return
        before = self._broker.host_pids()
        self._broker.write_app(text)

        def runs() -> bool:
            hosts = self._broker.stats()["hosts"]
            return len(hosts) == 1 and hosts[0] not in before

        eventually(runs, "the new code", 3 * DEADLINE_SECONDS)

    def _here(self, text: str) -> str:
        return text.replace(f":{PORT_IN_PAGES}", f":{self._broker.port}")

    def _check(self, command: str, expected: str) -> None:
        words = shlex.split(self._here(command))
        run = {"curl": _curl, "python": self._python, "broker": self._broker_command}[words[0]]
        # What a former client has left behind is gone in a moment, so questions may be asked again.
        deadline = time.monotonic() + (DEADLINE_SECONDS if words[0] == "broker" else 0)
        while not _CHECKER.check_output(self._here(expected), found := run(words[1:]), _FLAGS):
            if time.monotonic() >= deadline:
                raise AssertionError(f"$ {command}\nexpected\n{expected}\nfound\n{found}\n{self._broker.log}")

    def _python(self, words: list[str]) -> str:
        return _run([sys.executable, *words], self._folder)

    def _broker_command(self, words: list[str]) -> str:
        command = [sys.executable, "-P", "-m", "broker", *words, "--data", str(self._broker.data)]
        return _run(command, ROOT)


def _run(command: list[str], folder: Path) -> str:
    result = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # programs import the broker that is tested
        capture_output=True,
        text=True,
        timeout=3 * DEADLINE_SECONDS,
        check=False,
    )
    return result.stdout + result.stderr


def _curl(words: list[str]) -> str:
    """`curl [-X METHOD] [-d DATA] URL`, which not every machine has."""
    *pairs, url = words
    options = dict(zip(pairs[::2], pairs[1::2], strict=True))
    data = options["-d"].encode() if "-d" in options else None
    request = urllib.request.Request(url, data, method=options.get("-X"))
    try:
        with urllib.request.urlopen(request, timeout=DEADLINE_SECONDS) as response:
            body: bytes = response.read()
    except urllib.error.HTTPError as refused:
        with refused:
            body = refused.read()
    return body.decode()
