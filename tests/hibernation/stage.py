"""Stand-ins for the children of a supervisor: scripts that do what a file tells them, and write down that
they did. The keeper is the real one, in the same wrapping.

Owns the folder in which they find what to do, and the certainty that none of them outlives its test.
"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import trio

from hibernation.admin import AdminError, SupervisorClient
from hibernation.gateway_line import Line, LineError
from hibernation.listener import bind_listener
from hibernation.plan import Commands, Plan, Timing
from hibernation.processes import ProcessList, started_at_ticks
from hibernation.settings import Settings
from hibernation.supervisor import Supervisor
from tests.e2e.broker_process import whole_lines

__all__ = [
    "PROGRAM",
    "QUICK",
    "FakeGateway",
    "Stage",
    "Timing",
    "order",
    "refused",
    "running",
    "running_to_its_end",
    "set_seconds",
    "settled",
    "until",
]

CHILD = """
import json, os, signal, sys
from pathlib import Path
kind, folder = sys.argv[1], Path(sys.argv[2])

def note(what):
    with open(folder / "journal", "a") as file:
        file.write(f"{kind} {what} {os.getpid()}\\n")

# As the real ones do: what it is to do is read when it starts, as code is.
behaviour = (folder / f"{kind}.does").read_text().split()
if kind == "keeper":
    sys.path[:0] = [sys.argv[3]]
    from hibernation import keeper
    note("start")
    def end(*_):
        note("term")
        os._exit(0)
    signal.signal(signal.SIGTERM, end)
    sys.exit(keeper.main())
config = json.loads(sys.stdin.readline())
place = kind
if config.get("handover"):
    kind = "spare"
    behaviour = (folder / "spare.does").read_text().split()
status = os.fdopen(config["status_fd"], "w", buffering=1)
(folder / f"{place}.config").write_text(json.dumps(config))
(folder / f"{place}.facts").write_text(json.dumps({
    "fds": [int(n) for n in os.listdir("/proc/self/fd") if os.path.lexists("/proc/self/fd/" + n)],
    "umask": os.umask(0o077), "cwd": os.getcwd(),
    "session": os.getsid(0) == os.getpid(), "path": sys.path[:1],
}))

asked = 0

def stop(*_):
    global asked
    note("term")
    asked += 1
    if "stubborn" not in behaviour and not ("slow-to-stop" in behaviour and asked == 1):
        os._exit(0)

signal.signal(signal.SIGTERM, stop)
note("start")
if "killed" in behaviour:
    os.kill(os.getpid(), signal.SIGKILL)
if "die" in behaviour:
    sys.exit(3)
if "hang" in behaviour:
    signal.pause()
if "error" in behaviour:
    print(json.dumps({"event": "error", "text": "no Server in it"}), file=status)
    sys.exit(1)
if place == "host":
    parties = [{"name": name} for name in (folder / "parties").read_text().split()]
    if "own-parties" in behaviour:
        parties = [{"name": str(os.getpid())}]
    if "slow" in behaviour:
        import time
        time.sleep(0.5)
    print(json.dumps({"event": "loaded", "parties": parties}), file=status)
elif kind == "spare":
    print(json.dumps({"event": "waiting"}), file=status)
if kind != "gateway":
    if sys.stdin.readline() not in ("go\\n", "go, all is kept\\n"):
        sys.exit(0)
    note("go")
if "die-after-go" in behaviour:
    sys.exit(5)
if "killed-after-go" in behaviour:
    os.kill(os.getpid(), signal.SIGKILL)
if "hang-after-go" in behaviour:
    signal.pause()
if "error-after-go" in behaviour:
    print(json.dumps({"event": "error", "text": "no registry"}), file=status)
    sys.exit(1)
if place == "gateway":
    print(json.dumps({"event": "ready"}), file=status)
if "pulse" in behaviour:
    import time
    while True:
        print(json.dumps({"event": "beat"}), file=status)
        time.sleep(0.02)
if "beat" in behaviour:
    import time
    while (folder / "alive").exists():
        print(json.dumps({"event": "beat"}), file=status)
        time.sleep(0.02)
    note("silent")
if "die-later" in behaviour:
    sys.exit(4)
while True:
    signal.pause()
"""

QUICK = Timing(
    load_seconds=30,
    drain_seconds=30,
    finish_seconds=30,
    keeper_seconds=30,
    backoff_first_seconds=0.01,
    backoff_limit_seconds=0.02,
    backoff_reset_seconds=60,
    patience_seconds=0,
    freeze_seconds=30,
    handover_seconds=30,
    resume_seconds=30,
    spare_seconds=math.inf,
)
"""Hardly a wait between two starts, and no spare gateway, unless a test wants one. No deadline that a busy
machine meets: a test in which one is to pass makes that one short.
"""


def set_seconds(timing: Timing, name: str, seconds: float) -> None:
    """Change a deadline of a supervisor that runs: what went before, its start for one, took what it took."""
    object.__setattr__(timing, f"{name}_seconds", seconds)


class Stage:
    """A folder in which the stand-ins find what they are to do, and write down what happened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.does("gateway")
        self.does("host")
        self.does("spare")
        self.does("keeper")
        (folder / "parties").write_text("chat")
        (folder / "child.py").write_text(CHILD)
        self.listener = bind_listener("127.0.0.1", 0, receive_buffer_bytes=131072)
        self.announced: list[tuple[str, int]] = []

    def does(self, kind: str, *behaviour: str) -> None:
        (self.folder / f"{kind}.does").write_text(" ".join(behaviour))

    @property
    def commands(self) -> Commands:
        child = str(self.folder / "child.py")
        return Commands(
            gateway=(sys.executable, "-IS", child, "gateway", str(self.folder)),
            host=(sys.executable, "-IS", child, "host", str(self.folder)),
            keeper=(sys.executable, "-IS", child, "keeper", str(self.folder), os.getcwd()),
        )

    def supervisor(
        self,
        *,
        hosts: int = 1,
        timing: Timing = QUICK,
        changes: Callable[[], AsyncIterator[Collection[object]]] | None = None,
        connect: "FakeGateway | None" = None,
        listens: bool = True,
        bind: tuple[str, int] = ("127.0.0.1", 0),
    ) -> Supervisor:
        plan = Plan(
            app="chat.py",
            data=self.folder,
            listener=self.listener if listens else None,
            settings=Settings(),
            hosts=hosts,
            variables={"KEY": "canary"},
            bind=bind,
        )
        return Supervisor(
            plan,
            announce=self.announced.append,
            commands=self.commands,
            timing=timing,
            changes=changes,
            connect=connect,
        )

    def is_up(self) -> bool:
        """The instance is announced, and its hosts were told to go."""
        return bool(self.announced and self.pids("host go"))

    def assert_all_ended(self) -> None:
        """None of the stand-ins runs."""
        for line in self._lines():
            assert started_at_ticks(int(line.rsplit(" ", 1)[1])) is None, f"left running: {line}"

    def listed(self, name: str) -> list[int]:
        """The processes that are listed under the name, and run."""
        return [pid for listed, pid in ProcessList(self.folder).surviving() if listed == name]

    @property
    def journal(self) -> list[str]:
        """Lines such as "host start", in the order in which they were written."""
        return [line.rsplit(" ", 1)[0] for line in self._lines()]

    def pids(self, what: str) -> list[int]:
        """The processes that wrote `what`."""
        return [int(line.rsplit(" ", 1)[1]) for line in self._lines() if line.startswith(what + " ")]

    def _lines(self) -> list[str]:
        return whole_lines(self.folder / "journal")

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())


async def until(condition: Callable[[], object], seconds: float = 60) -> None:
    with trio.fail_after(seconds):
        while True:
            await trio.sleep(0.005)  # what is waited for happens in other processes
            if condition():
                return


def running(supervisor: Supervisor, script: Callable[[], Awaitable[None]]) -> None:
    """Run the supervisor with the script beside it, then stop it."""

    async def main() -> None:
        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:
                await nursery.start(supervisor.run)
                try:
                    await script()
                finally:
                    supervisor.request_stop()

    trio.run(main)


class FakeGateway:
    """Stands for `gateway.sock`: what the gateway that is listed first answers to each command.

    An answer is a value, an exception that is raised, or a function that may wait, or do harm, before.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.asked: list[str] = []
        self.closed = 0
        self.answers: dict[str, Any] = {
            "stats": lambda: {"hosts": stage.pids("host go")},
            "freeze": {"frozen": True},
            "resume": {"resumed": True},
            "leave": self.leave,
            "drain": {"closed": 0},
        }

    async def __call__(self) -> Line:
        listed = self.stage.listed("gateway")
        if not listed:
            raise LineError("nobody listens", broken=True)
        return _FakeLine(self, listed[0])

    def leave(self) -> dict[str, bool]:
        """The oldest gateway exits."""
        os.kill(self.stage.pids("gateway start")[0], signal.SIGTERM)
        return {"left": True}


class _FakeLine:
    def __init__(self, gateway: FakeGateway, pid: int) -> None:
        self._gateway = gateway
        self.pid = pid

    async def ask(self, command: str, within_seconds: float, **_: object) -> Any:
        if command != "stats":
            self._gateway.asked.append(command)
        answer = self._gateway.answers[command]
        try:
            with trio.fail_after(within_seconds):
                await trio.lowlevel.checkpoint()
                if callable(answer):
                    answer = answer()
                    if isinstance(answer, Awaitable):
                        answer = await answer
        except trio.TooSlowError:
            raise LineError(f"no answer to {command!r} within {within_seconds:g} s", broken=False) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()
        self._gateway.closed += 1


async def order(folder: Path, command: str, **parameters: object) -> Any:
    """Give an order as the command line does: its result, or the text of its error as an AdminError."""

    def ask() -> Any:
        with SupervisorClient(folder) as client:
            return client.ask(command, **parameters)

    return await trio.to_thread.run_sync(ask, abandon_on_cancel=True)


@contextlib.contextmanager
def refused(text: str) -> Iterator[None]:
    """The order in the block fails with a text that holds this one."""
    try:
        yield
    except AdminError as error:
        assert text in str(error), error
    else:
        raise AssertionError("it was carried out")


def running_to_its_end(supervisor: Supervisor) -> None:
    async def main() -> None:
        with trio.fail_after(100):
            await supervisor.run()

    trio.run(main)


PROGRAM = """
import sys, trio
from pathlib import Path
sys.path[:0] = [{root!r}]
from hibernation.plan import Commands, Timing
from hibernation.listener import bind_listener
from hibernation.logs import configure
from hibernation.settings import Settings
from hibernation.supervisor import Plan, Supervisor
folder = Path({folder!r})
configure(False)
listener = None if {takes_over} else bind_listener("127.0.0.1", 0, receive_buffer_bytes=131072)
plan = Plan(app="a", data=folder, listener=listener, settings=Settings(), hosts={hosts})
commands = Commands(gateway={gateway!r}, host={host!r}, keeper={keeper!r})
# No stand-in answers at gateway.sock, so that there is nothing to wait for.
timing = Timing(drain_seconds=600, finish_seconds=600, freeze_seconds=0.3, spare_seconds={spare})
supervisor = Supervisor(plan, announce=lambda address: print("ready", *address, flush=True),
                        commands=commands, timing=timing)
trio.run(supervisor.run)
"""


def settled(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
