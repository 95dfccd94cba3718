"""The real command, running: started with an app given as source text, asked, hurt, stopped.

Owns the start of `broker serve` (or `dev`) on a free port of the loopback in a folder of its own, what /proc
and the command line's socket say about it, and its end: whatever a test does, nothing that was started here
outlives it. Peers: the fixtures of `conftest`, `raw_client`.
"""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from hibernation.admin import AdminClient, AdminError, SupervisorClient
from hibernation.processes import ProcessList
from tests.e2e.raw_client import RawClient

__all__ = ["DEADLINE_SECONDS", "BrokerProcess", "eventually"]

ROOT = Path(__file__).resolve().parents[2]

#: How long anything may take before a test gives it up: far more than it needs on a busy machine.
DEADLINE_SECONDS = 20.0

#: The same for the start of an instance, and for its stop, in which each process may have to be waited for.
START_SECONDS = 60.0
STOP_SECONDS = 60.0

_READY = re.compile(r"ready on http://(\S+):(\d+)\n")

T = TypeVar("T")


def eventually(condition: Callable[[], T], what: str = "", seconds: float = DEADLINE_SECONDS) -> T:
    """Give the first result of `condition` that is true; fail after `seconds`. It is asked every 10 ms."""
    deadline = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() >= deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}; the last was {result!r}")
        time.sleep(0.01)


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that another process appends to, without a half-written last one; no file, none."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


class BrokerProcess:
    """One instance: a supervisor with its gateway and hosts; a context manager that starts and stops it.

    `app` is source text (dedented here) and goes to `folder/app.py`. Options become those of the command:
    `idle_seconds=1` is `--idle-seconds 1`. The supervisor's pid is `.pid`.
    """

    def __init__(
        self,
        folder: Path,
        app: str,
        *arguments: str,
        command: str = "serve",
        environ: dict[str, str] | None = None,
        **options: object,
    ) -> None:
        self.folder = folder
        self.app_file = folder / "app.py"
        self.data = folder / "data"
        self._command = command
        self._environ = environ or {}
        self._options = [*arguments]
        for name, value in options.items():
            self._options += [f"--{name.replace('_', '-')}", str(value)]
        self._log_file = folder / "broker.log"
        self._process: subprocess.Popen[str] | None = None
        self.port = 0
        self.write_app(app)

    # --- Start and end

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        else:
            self.destroy()

    def write_app(self, source: str) -> None:
        """Write the app's file, as an editor does: whole, at once."""
        fresh = self.app_file.with_suffix(".new")
        fresh.write_text(textwrap.dedent(source))
        fresh.replace(self.app_file)

    def start(self) -> Self:
        """Start the command and wait until it says that it is ready. A second start takes the same port."""
        assert self._process is None, "it is running"
        if self._command == "serve":
            address = ["--bind", f"127.0.0.1:{self.port}"]
        else:
            address = ["--port", str(self.port)]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
        environ.update({"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **self._environ})
        command = [sys.executable, "-P", "-m", "broker", self._command, "app.py", "--data", str(self.data)]
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *address, *self._options],
                cwd=self.folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        try:
            self.port = self._wait_until_ready()
            eventually(lambda: self.stats()["hosts"], "a host")
        except BaseException:
            self.destroy()
            raise
        return self

    def _wait_until_ready(self) -> int:
        assert self._process is not None and self._process.stdout is not None
        output = self._process.stdout.fileno()  # past its buffer, which `select` knows nothing of
        deadline = time.monotonic() + START_SECONDS
        text = ""
        while time.monotonic() < deadline:
            if not select.select([output], [], [], 0.1)[0]:
                continue
            data = os.read(output, 1 << 16)
            text += data.decode(errors="replace")
            if found := _READY.search(text):
                return int(found[2])
            if not data:
                break
        raise AssertionError(f"the broker did not start: {text!r}\n{self.log}")

    def stop(self) -> None:
        """Stop it as an operator does, and assert that it has gone with status 0 and left no process."""
        process = self._process
        if process is None:
            return
        left = self._children()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        try:
            process.send_signal(signal.SIGTERM)
            try:
                status = process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                raise AssertionError(f"the broker did not stop:\n{self.log}") from None
            assert status == 0, f"status {status}:\n{self.log}"
            eventually(lambda: not any(_runs(pid) for pid in left), "end of all its processes")
        finally:
            self.destroy()

    def destroy(self) -> None:
        """Kill whatever is left of it, no questions asked."""
        # The supervisor first: it would start the others again.
        if self._process is not None:
            self.kill_supervisor()
        for pid in self._children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # --- Addresses

    def url(self, path: str = "/") -> str:
        """The address of `path` for HTTP."""
        return f"http://127.0.0.1:{self.port}{path}"

    def ws_url(self, path: str = "/party/room") -> str:
        """The address of `path` for a WebSocket."""
        return f"ws://127.0.0.1:{self.port}{path}"

    def connect(self, path: str = "/party/room", **options: Any) -> RawClient:
        """A raw client whose handshake on `path` has succeeded."""
        client = RawClient(self.port)
        try:
            client.handshake(path, **options)
        except BaseException:
            client.close()
            raise
        return client

    # --- Questions

    def ask(self, command: str, **parameters: object) -> Any:
        """What the gateway answers to a command of the command line.

        A host that was given no time for so long that the gateway goes on without it is asked again, once.
        """
        with AdminClient(self.data, timeout_seconds=DEADLINE_SECONDS) as client:
            try:
                answer = client.ask(command, **parameters)
            except AdminError as error:
                if "the host does not answer" not in str(error):
                    raise
            else:
                silent = command == "stats" and answer["silent_hosts"]
                silent = silent or (command == "rooms" and None in [row["awake"] for row in answer["rooms"]])
                if not silent:
                    return answer
            return client.ask(command, **parameters)

    def stats(self) -> dict[str, Any]:
        """What `broker stats --json` shows, but for what the command line adds."""
        found: dict[str, Any] = self.ask("stats")
        return found

    def connections(self, **filters: object) -> list[dict[str, Any]]:
        """The rows of `broker connections --json`."""
        with AdminClient(self.data, timeout_seconds=DEADLINE_SECONDS) as client:
            return list(client.pages("connections", "connections", **filters))

    @property
    def pid(self) -> int:
        """The supervisor's process id."""
        assert self._process is not None
        return self._process.pid

    def gateway_pid(self) -> int:
        """The gateway's process id."""
        [pid] = self._present("gateway")
        return pid

    def host_pids(self) -> list[int]:
        """The process ids of the hosts that run, in order of their index."""
        return self._listed("host")

    def _present(self, kind: str) -> list[int]:
        """The process ids of a kind, one at least: a new process is listed a moment after its start."""
        return eventually(partial(self._listed, kind), f"a {kind}")

    def _listed(self, kind: str) -> list[int]:
        return [pid for name, pid in sorted(ProcessList(self.data).surviving()) if name.startswith(kind)]

    def keeper_pid(self) -> int:
        """The keeper's process id."""
        [pid] = self._present("keeper")
        return pid

    def _children(self) -> list[int]:
        return [pid for name, pid in ProcessList(self.data).surviving() if name != "supervisor"]

    def unread_bytes(self, peer_port: int | None = None) -> int:
        """What clients have sent and the gateway has not consumed, FIONREAD as the kernel counts it.

        Of all open sockets of the gateway, or of the one whose client has `peer_port`. Source: proc(5),
        /proc/net/tcp, column rx_queue.
        """
        total = 0
        here = f":{self.port:04X} "
        there = "" if peer_port is None else f":{peer_port:04X} "
        # The table is the whole machine's: lines are sorted out before they are taken apart.
        for line in Path("/proc/net/tcp").read_text().splitlines():
            if here in line and there in line:
                _, local, remote, state, queues = line.split()[:5]
                if f"{local} ".endswith(here) and f"{remote} ".endswith(there) and state != "0A":
                    total += int(queues.partition(":")[2], 16)
        return total

    # --- Misfortunes

    def signal_hosts(self, number: int) -> list[int]:
        """Send a signal to every host; returns their process ids. Between two hosts it waits for the next."""
        pids = self._present("host")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # one that was being replaced has gone since
                os.kill(pid, number)
        return pids

    def kill_host(self, number: int = signal.SIGKILL, *, wait_for_next: bool = True) -> list[int]:
        """End every host by a signal and wait until each has gone, and until its successor is linked; returns
        the process ids of those that have gone.
        """
        before = self.signal_hosts(number)
        eventually(lambda: not any(_runs(pid) for pid in before), f"end of hosts {before}")
        if wait_for_next:
            self.wait_for_hosts(len(before), without=before)
        return before

    def reload(self) -> list[int]:
        """Have all hosts replaced, also those that have just died and whose successors would keep waiting;
        returns the process ids of the new ones, to which the gateway has its links.
        """
        with SupervisorClient(self.data) as client:
            hosts: list[int] = client.ask("reload")["hosts"]
        return hosts

    def kill(self, *kinds: str, number: int = signal.SIGKILL) -> list[int]:
        """End the processes of these kinds ("gateway", "keeper", "host"), all at once; returns when they have
        gone.
        """
        pids = [pid for kind in kinds for pid in self._present(kind)]
        # All of them stand still before the first dies, so that none can help another's successor meanwhile.
        numbers = [signal.SIGSTOP, number] if number == signal.SIGKILL and len(pids) > 1 else [number]
        for each in numbers:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, each)
        eventually(lambda: not any(_runs(pid) for pid in pids), f"end of {kinds}")
        return pids

    def kill_gateway(self) -> None:
        """End the gateway with SIGKILL, and wait until its successor serves all shards."""
        [before] = self.kill("gateway")
        self.wait_for_gateway(without=before)

    def wait_for_gateway(self, *, without: int) -> None:
        """Wait until another gateway than this one serves all shards."""

        def serves() -> bool:
            try:
                stats = self.stats()
            except AdminError:
                return False  # between two gateways nobody answers
            return bool(stats["ready"] and stats["gateways"] != [without])

        eventually(serves, "a gateway that serves")

    def wait_for_hosts(self, count: int = 1, *, without: Sequence[int] = ()) -> None:
        """Wait until the gateway has links to `count` hosts, none of which is one of `without`."""

        def linked() -> bool:
            hosts = self.stats()["hosts"]
            return len(hosts) == count and not set(hosts) & set(without)

        eventually(linked, f"{count} new hosts")

    def kill_supervisor(self) -> None:
        """kill -9 of the supervisor alone: `start` takes over what it leaves behind."""
        process, self._process = self._process, None
        assert process is not None and process.stdout is not None
        process.kill()
        process.wait()
        process.stdout.close()

    def command(self, name: str, *arguments: str) -> tuple[int, str]:
        """Run a command that speaks to this instance; gives its status and what it said."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "broker", name, "--data", str(self.data), *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=3 * DEADLINE_SECONDS,
            check=False,
        )
        return done.returncode, done.stdout

    # --- Log

    @property
    def log(self) -> str:
        """All that was written to standard error, of all its processes."""
        return self._log_file.read_text(errors="replace") if self._log_file.exists() else ""

    def log_events(self, event: str | None = None) -> list[dict[str, Any]]:
        """The lines of the log, or those of one event."""
        return [each for each in self._read_log() if event is None or each.get("event") == event]

    def _read_log(self) -> Iterator[dict[str, Any]]:
        for line in self.log.splitlines():
            with contextlib.suppress(ValueError):
                fields = json.loads(line)
                if isinstance(fields, dict):
                    yield fields


def _runs(pid: int, ended: str = "ZX") -> bool:
    """Whether there is the process, in a state that is none of `ended` (proc(5), /proc/PID/stat, field 3)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ended
