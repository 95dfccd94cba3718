"""Writes requirements.txt and requirements-dev.txt: every package in one version, with hashes.

The files name packages, versions and hashes only, never where they were downloaded from: that is the
business of whoever installs. Versions that still fit are kept, unless `--upgrade` asks for the newest.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = "# Made by `make lock` from {source}. Versions and hashes of what is tested; do not edit.\n"
OPTIONS = [
    "--quiet",
    "--generate-hashes",
    "--allow-unsafe",
    "--strip-extras",
    "--no-header",
    "--no-emit-index-url",
    "--no-emit-trusted-host",
    "--no-emit-find-links",
    "--no-emit-options",
]


def lock(source: str, target: str) -> None:
    """Resolve `source` and write `target`, both relative to the repository."""
    command = [sys.executable, "-m", "piptools", "compile", *OPTIONS, *sys.argv[1:], "--output-file", target]
    subprocess.run([*command, source], cwd=ROOT, check=True)
    path = ROOT / target
    path.write_text(HEADER.format(source=source) + path.read_text())


if __name__ == "__main__":
    lock("pyproject.toml", "requirements.txt")
    lock("requirements-dev.in", "requirements-dev.txt")
