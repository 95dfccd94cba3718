"""strace at a running process: what it calls, and calls that fail, wait or kill it when they are told to.

Owns the attachment and its end. An injection is strace's own (strace(1), `-e inject`): `error=EIO:when=3`,
`signal=KILL:when=5+`, `delay_enter=200ms`. It counts calls for each thread on its own, from the attachment
on, and holds for all threads, and for processes that are started meanwhile.
"""

import contextlib
import os
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.tools import program

__all__ = ["injected", "traced"]

ATTACH_SECONDS = 60.0
#: For each of the ways to end it, of which the last lets go of whatever it held.
DETACH_SECONDS = 20.0


@contextlib.contextmanager
def traced(pids: Sequence[int], *options: str, log: Path | None = None) -> Iterator[None]:
    """Have strace at these processes, from when it says so to the end of the block."""
    command = [program("strace"), "-f", "-o", str(log or os.devnull), *options]
    for pid in pids:
        command += ["-p", str(pid)]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        _wait_for_attachment(tracer, pids)
        yield
    finally:
        _end(tracer, pids)


@contextlib.contextmanager
def injected(pids: Sequence[int], call: str, what: str, *, log: Path | None = None) -> Iterator[None]:
    """While the block runs, have `what` happen at `call`: `error=EIO:when=2`. The calls, and the signals that
    come, are written to `log`.
    """
    options = ("-e", f"trace={call}", "-e", f"inject={call}:{what}")
    with traced(pids, *options, log=log):
        yield


def _end(tracer: "subprocess.Popen[bytes]", pids: Sequence[int]) -> None:
    """End strace: by itself where all that it traces has died: a signal might make it wait for ever."""
    steps = [lambda: None] if not any(_runs(pid) for pid in pids) else []
    for step in (*steps, tracer.terminate, tracer.kill):
        step()
        with contextlib.suppress(subprocess.TimeoutExpired):
            tracer.communicate(timeout=DETACH_SECONDS)
            return
    raise RuntimeError("strace does not end")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_for_attachment(tracer: "subprocess.Popen[bytes]", pids: Sequence[int]) -> None:
    assert tracer.stderr is not None
    deadline = time.monotonic() + ATTACH_SECONDS
    said = b""
    # A process of several threads is said to be attached once, and each that it starts later on, too.
    while not all(b"Process %d attached" % pid in said for pid in pids):
        if not select.select([tracer.stderr], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise RuntimeError(f"strace does not attach: {said!r}")
        data = os.read(tracer.stderr.fileno(), 4096)
        said += data
        if not data:
            raise RuntimeError(
                f"strace has ended: {said!r}; it takes root, or a lower kernel.yama.ptrace_scope"
            )
