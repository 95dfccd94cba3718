"""Every example has its page of docs, its row in the list, and its tests."""

import ast
import re

import pytest

from tests.docs.pages import blocks_of
from tests.examples.conftest import EXAMPLES

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))
TESTS = {path.stem: path for path in EXAMPLES.parents[1].joinpath("tests", "examples").glob("test_*.py")}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_complete(name: str) -> None:
    text = (EXAMPLES / f"{name}.md").read_text()
    command = f"broker dev docs/examples/{name}.py"
    assert f"]({name}.md) |" in (EXAMPLES / "index.md").read_text()
    assert any(
        block.language == "sh" and block.text.startswith(command)
        for block in blocks_of(EXAMPLES / f"{name}.md")
    )
    assert "## How it works" in text
    assert "## What to watch out for" in text
    assert (f"]({name}.html)" in text) is (EXAMPLES / f"{name}.html").exists()
    assert command in (ast.get_docstring(ast.parse((EXAMPLES / f"{name}.py").read_text())) or "")
    tests = TESTS[f"test_{name}"].read_text()
    assert "kill_host(" in tests
    assert re.search(rf'follow\(\w+, "{name}"\) == \d', tests)


def test_nothing_else_lies_there() -> None:
    """A page without an app, or docs of an app that is gone."""
    assert {path.stem for path in EXAMPLES.iterdir() if path.is_file()} == {*NAMES, "index"}
