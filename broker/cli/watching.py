"""Seeing that somebody has saved the app's code.

Owns the choice of files that count. Starts nothing anew: that is the supervisor's, which calls `saves`.
"""

from collections.abc import AsyncIterator, Collection
from pathlib import Path

__all__ = ["counts", "saves"]

CODE_SUFFIXES = (".py", ".pyi", ".env")

IDLE_FOLDERS = frozenset(
    {"__pycache__", ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "site-packages", ".tox", ".idea"}
    | {".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"}
)
"""Folders below an app in which nobody edits its code."""

POLL_MS = 200
"""How often the thread that watches looks whether it is still wanted: it cannot be cancelled."""


def counts(path: Path, folder: Path, without: Path) -> bool:
    """Say whether the file is code in `folder`: Python or `.env`, and outside `without`."""
    if not path.name.endswith(CODE_SUFFIXES) or path.name.startswith(".#"):
        return False
    if path.is_relative_to(without) or not path.is_relative_to(folder):
        return False
    return IDLE_FOLDERS.isdisjoint(path.relative_to(folder).parts[:-1])


async def saves(folder: Path, *, without: Path) -> AsyncIterator[Collection[str]]:
    """Give the files that were saved in the folder or below it, as they are; an empty collection now and then
    says that none were, the first one that the watching has begun.

    Editors save in several steps; those within 50 ms count as one. Raises `OSError` when the system will not
    watch the folder, or not so many.
    """
    from watchfiles import awatch

    def wanted(_: object, path: str) -> bool:
        return counts(Path(path), folder, without)

    try:
        async for changed in awatch(
            folder,
            watch_filter=wanted,
            rust_timeout=POLL_MS,
            yield_on_timeout=True,
            debounce=1000,
            ignore_permission_denied=True,
        ):
            yield {path for _, path in changed}
    except RuntimeError as error:
        raise OSError(f"the file watcher failed: {error}") from error
