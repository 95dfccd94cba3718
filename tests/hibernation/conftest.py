"""Fixtures of the tests of the supervisor and its parts."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hibernation.processes import ProcessList
from tests.hibernation.stage import PROGRAM, Stage, settled


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    made.listener.close()
    made.assert_all_ended()


@pytest.fixture
def program(stage: Stage) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start a supervisor as a process of its own; whatever happens, nothing is left running."""
    started: list[subprocess.Popen[str]] = []

    def start(hosts: int = 1, *, takes_over: bool = False) -> subprocess.Popen[str]:
        text = PROGRAM.format(
            root=os.getcwd(),
            folder=str(stage.folder),
            gateway=stage.commands.gateway,
            host=stage.commands.host,
            keeper=stage.commands.keeper,
            hosts=hosts,
            spare="float('inf')",
            takes_over=takes_over,
        )
        process = subprocess.Popen(
            [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    for _, pid in ProcessList(stage.folder).surviving():
        with contextlib.suppress(ProcessLookupError):  # it may be about to end by itself
            os.kill(pid, signal.SIGKILL)
    settled(lambda: not ProcessList(stage.folder).surviving())
