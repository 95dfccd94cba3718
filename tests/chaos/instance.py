"""The broker under fire: started, its processes found, started again when its supervisor was killed.

Owns the folder of a run, the command `broker serve` in it and the ids of its processes. Unlike
`tests.e2e.broker_process` it waits for nothing that it was not asked to wait for: what is killed during a
start is part of the trial. Peer: `killer`.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from hibernation.admin import AdminClient
from hibernation.processes import ProcessList
from storage.errors import BrokerError

__all__ = ["APP", "KINDS", "ROOT", "Instance", "alive"]

ROOT = Path(__file__).resolve().parents[2]
APP = Path(__file__).with_name("app.py")
KINDS = ("gateway", "host", "keeper", "supervisor")
START_SECONDS = 30.0
_READY = re.compile(r"ready on http://\S+:(\d+)")


class Instance:
    """One instance in a folder of its own; a context manager."""

    def __init__(self, folder: Path, *options: str, app: Path = APP) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.port = 0
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._out = folder / "ready.txt"
        shutil.copy(app, folder / "app.py")

    def __enter__(self) -> Self:
        try:
            self.spawn()
            self.wait_until_ready()
        except BaseException:
            self.destroy()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def spawn(self) -> None:
        """Start `broker serve`, without waiting for it; on the port of before, if there was one."""
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        environ |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        self._out.write_bytes(b"")
        command = [sys.executable, "-P", "-m", "broker", "serve", "app.py", "--data", str(self.data)]
        with self._out.open("ab") as out, (self.folder / "broker.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--bind", f"127.0.0.1:{self.port}", *self._options],
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
            )

    @property
    def ready(self) -> bool:
        """Whether the command has said so."""
        found = _READY.search(self._out.read_text())
        if found:
            self.port = int(found[1])
        return found is not None

    @property
    def supervised(self) -> bool:
        """Whether the command runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def was_killed(self) -> bool:
        """Whether the command was ended by a signal, and not by itself."""
        return self._process is not None and (self._process.poll() or 0) < 0

    def wait_until_ready(self, seconds: float = START_SECONDS) -> None:
        """Return when the command has said that it is ready and the gateway answers."""
        deadline = time.monotonic() + seconds
        while not (self.ready and self.answers()):
            if not self.supervised or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the broker did not start; see {self.folder / 'broker.log'}\n{self.tail()}"
                )
            time.sleep(0.02)

    def answers(self) -> bool:
        """Whether the gateway answers and has all its hosts."""
        try:
            with AdminClient(self.data, timeout_seconds=5) as client:
                return bool(client.ask("stats")["ready"])
        except (BrokerError, OSError):
            return False

    def covered(self) -> bool:
        """Whether gateway and keeper hold the same connections, seen from outside.

        A socket that both have lost is lost. Until a new keeper has been filled, or a new gateway has taken
        over, there is one process whose death nothing can mend.
        """
        keepers, gateways = self.pids("keeper"), self.pids("gateway")
        if len(keepers) != 1 or len(gateways) != 1:
            return False
        try:
            before = self._sockets()
            time.sleep(0.05)
            held = _held(keepers[0]) & _held(gateways[0])
        except OSError:
            return False
        # Who came or went meanwhile does not count.
        return before & self._sockets() <= held

    def _sockets(self) -> set[str]:
        """The established connections to our port, as /proc/PID/fd names them (proc(5), /proc/net/tcp)."""
        here = f":{self.port:04X} "
        found = set()
        for line in Path("/proc/net/tcp").read_text().splitlines():
            if here in line:
                fields = line.split()
                # Of established ones, those that nobody has accepted yet have no number.
                # 08: the client has ended its side, and what it had sent may still have to be handled.
                if f"{fields[1]} ".endswith(here) and fields[3] in ("01", "08") and fields[9] != "0":
                    found.add(f"socket:[{fields[9]}]")
        return found

    def tail(self, lines: int = 12) -> str:
        """The last lines of the log."""
        text = (self.folder / "broker.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def pids(self, kind: str) -> list[int]:
        """The process ids of one kind that run now."""
        if kind == "supervisor":
            return [self._process.pid] if self.supervised and self._process is not None else []
        listed = ProcessList(self.data).surviving()
        return [pid for name, pid in listed if name.startswith(kind)]

    def command(self, *words: str) -> "subprocess.Popen[bytes]":
        """Start `broker WORDS --data …`."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "broker", *words, "--data", str(self.data)],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def stop(self, seconds: float = 60.0) -> int:
        """Stop it as an operator does, and give its status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(seconds)

    def destroy(self) -> None:
        """Kill whatever is left of it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for _ in range(3):
            for _, pid in ProcessList(self.data).surviving():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _held(pid: int) -> set[str]:
    """The sockets that a process has open."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(os.readlink(file))
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
