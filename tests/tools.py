"""Finds the programs that end-to-end tests need beside Python.

Where one is missing the test is skipped, with the command that installs it; with REQUIRE_TOOLS=1 in the
environment, as in .ci/run, it fails.
"""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

NODE_FOLDER = Path(__file__).parent / "e2e" / "node"


def missing(what: str) -> NoReturn:
    """Skip the running test for lack of `what`, or fail it where tools are required."""
    text = f"{what} is not installed; `make tools` installs it"
    if os.environ.get("REQUIRE_TOOLS") == "1":
        pytest.fail(text, pytrace=False)
    pytest.skip(text)


def program(*names: str) -> str:
    """The path of the first of `names` that is installed; /usr/sbin counts as on the path."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    for name in names:
        found = shutil.which(name, path=path)
        if found:
            return found
    missing(names[0])


def chromium() -> str:
    """The path of a Chromium that Playwright's client can drive."""
    return program("chromium", "chromium-browser", "google-chrome")


def nginx() -> str:
    """The path of nginx."""
    return program("nginx")


def node(*packages: str) -> str:
    """The path of Node; these packages of tests/e2e/node (by default partysocket) are there too."""
    path = program("node")
    for package in packages or ("partysocket",):
        if not (NODE_FOLDER / "node_modules" / package).is_dir():
            missing(f"the Node package {package} of tests/e2e/node")
    return path
