"""Fixtures of the end-to-end tests: factories of running brokers, one that ends with the test, one with the
module.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.broker_process import BrokerProcess

#: Takes the app's source text, more arguments of the command, and settings as keywords.
BrokerFactory = Callable[..., BrokerProcess]


@contextlib.contextmanager
def _factory(folders: Iterator[Path]) -> Iterator[BrokerFactory]:
    with contextlib.ExitStack() as stack:

        def start(app: str, *arguments: str, **options: object) -> BrokerProcess:
            process = BrokerProcess(next(folders), app, *arguments, **options)  # type: ignore[arg-type]
            stack.callback(process.stop)
            return process.start()

        yield start


def _folders(base: Path) -> Iterator[Path]:
    for number in itertools.count(1):
        folder = base / f"broker-{number}"
        folder.mkdir()
        yield folder


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerFactory]:
    """Start brokers that are stopped at the end of the test: `broker(app, idle_seconds=1)`."""
    with _factory(_folders(tmp_path)) as start:
        yield start


@pytest.fixture(scope="module")
def module_broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerFactory]:
    """Start brokers that are stopped after the module's last test."""
    with _factory(_folders(tmp_path_factory.mktemp("module"))) as start:
        yield start
