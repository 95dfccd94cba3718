"""docs/testing.md says what `broker.testing` does: its files are saved, and its tests run by pytest."""

import doctest
import os
import subprocess
import sys
from pathlib import Path

import pytest

from broker import testing
from tests.docs.pages import blocks_of
from tests.docs.reference import DOCS

ROOT = DOCS.parent
PAGE = DOCS / "testing.md"
REFERENCE = DOCS / "reference" / "testing.md"


def run_pytest(folder: Path, *files: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *files],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(600)  # three runs of pytest
def test_the_page_is_true(tmp_path: Path) -> None:
    commands = 0
    for block in blocks_of(PAGE):
        if block.language == "python" and block.file:
            (tmp_path / block.file).write_text(block.text)
        elif block.language == "console":
            for command, expected in block.commands:
                _, found = run_pytest(tmp_path, *command.split()[1:])
                flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                assert doctest.OutputChecker().check_output(expected, found, flags), found
                commands += 1
    assert commands == 2
    status, output = run_pytest(tmp_path)
    assert status == 0, output
    assert "19 passed" in output, output


def members(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_the_reference_has_every_member() -> None:
    text = REFERENCE.read_text()
    wanted = members(testing.Kit) | members(testing.Client) | members(testing.RoomView)
    wanted |= set(testing.__all__) - {"AsyncClient", "Errors"}
    wanted |= {"status", "headers", "header_list", "body", "text", "json"}
    for name in sorted(wanted):
        assert f"`{name}" in text or f"## {name}\n" in text, name


def test_both_kits_and_both_clients_have_the_same_members() -> None:
    assert members(testing.Kit) == members(testing.AsyncKit) - {"failure", "note", "spawn", "wait"}
    fields = {"closed", "id", "name", "received", "subprotocol"}
    assert members(testing.Client) == members(testing.AsyncClient) | fields
