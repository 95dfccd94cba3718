"""Fixtures for the examples of the docs: each runs as its reader runs it, by the real command."""

import importlib.util
import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from tests.docs.pages import Reader, blocks_of
from tests.docs.reference import DOCS
from tests.e2e.broker_process import DEADLINE_SECONDS, BrokerProcess
from tests.e2e.browser import Browser
from tests.e2e.conftest import BrokerFactory, module_broker

__all__ = ["module_broker"]  # a fixture that is shared with the other end-to-end tests

EXAMPLES = DOCS / "examples"

#: Takes an example's name and more arguments of the command.
ExampleFactory = Callable[..., BrokerProcess]

_rooms = itertools.count(1)


def http(method: str, url: str, **options: Any) -> httpx.Response:
    """Make a request, which may take as long as anything here."""
    return httpx.request(method, url, timeout=DEADLINE_SECONDS, **options)


def module_named(name: str) -> ModuleType:
    """The module of an example, for a look at its functions."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(module_broker: BrokerFactory) -> ExampleFactory:
    """Start an example, whose page lies beside it: `example("poll")`."""

    def start(name: str, *arguments: str) -> BrokerProcess:
        process = module_broker((EXAMPLES / f"{name}.py").read_text(), *arguments)
        page = EXAMPLES / f"{name}.html"
        if page.exists():
            shutil.copy(page, process.folder / "app.html")
        return process

    return start


@pytest.fixture
def room() -> str:
    """A room that no other test has been in."""
    return f"room-{next(_rooms)}"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for all pages."""
    with Browser() as running:
        yield running


@pytest.fixture
def follow(tmp_path: Path) -> Callable[[BrokerProcess, str], int]:
    """Do what an example's page of docs says, and check what it shows of the code: every block of Python
    without a name stands in the example as it is shown. Gives the number of commands run.
    """

    def run(broker: BrokerProcess, name: str) -> int:
        page = EXAMPLES / f"{name}.md"
        source = (EXAMPLES / f"{name}.py").read_text()
        for block in blocks_of(page):
            if block.language == "python" and not block.file:
                for piece in block.text.split("\n...\n"):
                    assert piece.strip("\n") in source, piece
        return Reader(broker, tmp_path).follow(page)

    return run
