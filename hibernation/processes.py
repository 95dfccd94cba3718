"""The list of an instance's processes, kept in its data directory for those who come after the supervisor.

Owns `processes.json`. A supervisor may die while its children go on serving (S34): the list is how
`broker stop` finds them, and how a second start finds what it takes over. A process id alone proves
nothing, since the kernel uses it again; with the time of the process's start it does.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["ProcessList", "started_at_ticks"]


class ProcessList:
    """Reads and writes the list of one data directory."""

    def __init__(self, data: Path) -> None:
        self._path = data / "processes.json"

    def write(self, processes: Iterable[tuple[str, int]]) -> None:
        """Replace the list by these names and process ids; each is alive, or an unreaped child."""
        listed = [[name, pid, started_at_ticks(pid)] for name, pid in processes]
        fresh = self._path.with_suffix(".new")
        try:
            fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "w") as file:
                json.dump(listed, file)
            fresh.replace(self._path)
        except OSError:
            # A full disk: the list only helps in a second misfortune, so it must not cause the first.
            return

    def remove(self) -> None:
        """Remove the list: nothing runs any more."""
        self._path.unlink(missing_ok=True)

    def surviving(self) -> list[tuple[str, int]]:
        """Give name and process id of those listed that still run."""
        try:
            listed = json.loads(self._path.read_text())
            return [
                (name, pid)
                for name, pid, ticks in listed
                if ticks is not None and started_at_ticks(pid) == ticks
            ]
        except (OSError, ValueError, TypeError):
            return []

    def open_surviving(self) -> list[tuple[str, int, int]]:
        """Give name, process id and pidfd of those listed that still run. The caller closes the pidfds, each
        of which means that one process for as long as it is open.
        """
        opened: list[tuple[str, int, int]] = []
        for name, pid in self.surviving():
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                continue
            if (name, pid) in self.surviving():  # it still is the one that was listed
                opened.append((name, pid, pidfd))
            else:
                os.close(pidfd)
        return opened


def started_at_ticks(pid: int) -> int | None:
    """Give when the process was started, in clock ticks since boot, or None when it does not run.

    Source: proc(5), /proc/PID/stat, fields 3 (state) and 22; the name in field 2 may hold anything.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        fields = text[text.rindex(")") + 2 :].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
