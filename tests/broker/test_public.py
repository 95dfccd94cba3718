"""The package's public names: where they come from, and what is not imported for their sake."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import broker


def test_what_type_checkers_read_is_what_runs() -> None:
    tree = ast.parse(Path(broker.__file__).read_text())
    typed: dict[str, str | None] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module not in ("importlib", "typing"):
            typed |= {alias.name: node.module for alias in node.names}
    assert typed == broker._HOME_OF
    assert sorted(typed) == sorted(broker.__all__)


@pytest.mark.parametrize("name", broker.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert callable(getattr(broker, name))
    assert name in dir(broker)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="module 'broker' has no attribute 'server_of'"):
        getattr(broker, "server_of")  # noqa: B009 - a type checker knows it, too


def test_a_gateway_does_not_import_what_rooms_are_made_of() -> None:
    """One that has to be started where no spare is left would be late by as much."""
    program = "import sys, broker.gateway.core; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "broker.gateway.core" in loaded
    assert not loaded & {"quart", "hibernation.room", "hibernation.pool", "broker.server"}
