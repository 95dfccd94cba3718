"""Seeing that somebody has saved the app's code.

Owns the choice of files that count. Starts nothing anew: that is the supervisor's, which calls `saves`.
"""

from collections.abc import AsyncIterator
from pathlib import Path

__all__ = ["counts", "saves"]

CODE_SUFFIXES = (".py", ".pyi", ".env")


def counts(path: Path, without: Path) -> bool:
    """Say whether a change of this file is a change of code: Python or `.env`, outside the data directory."""
    is_code = path.name.endswith(CODE_SUFFIXES) and not path.name.startswith(".#")
    return is_code and not path.is_relative_to(without)


async def saves(folder: Path, *, without: Path) -> AsyncIterator[object]:
    """Give the changed files, each time some were saved in the folder or below it.

    Editors save in several steps; those within 50 ms count as one. Raises `OSError` when the system will not
    watch so many folders.
    """
    from watchfiles import Change, DefaultFilter, awatch

    usual = DefaultFilter()  # leaves out .git, __pycache__, .venv, node_modules and editors' own files

    def wanted(change: Change, path: str) -> bool:
        return usual(change, path) and counts(Path(path), without)

    # The thread that watches cannot be cancelled: the short time-out is what bounds the wait for it.
    async for changed in awatch(folder, watch_filter=wanted, rust_timeout=250, debounce=1000):
        yield {path for _, path in changed}
