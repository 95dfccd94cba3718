"""How a command finds a running instance by its data directory, asks its gateway or its supervisor, and stops
it.

Owns the client's side of the admin sockets: 4 bytes of length and one CBOR map each way, one answer to one
question. It blocks, since a command has nothing else to do, and changes nothing in the data directory. Its
peers are the gateway, at `gateway.sock`, and the supervisor, at `supervisor.sock`.
"""

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import cbor2

from hibernation.processes import ProcessList
from storage.directory import SOCKET_PATH_BYTES_MAX, read_holder
from storage.errors import BrokerError

__all__ = [
    "AdminClient",
    "AdminError",
    "NoSupervisor",
    "NotRunning",
    "SupervisorClient",
    "processes_of",
    "stop",
    "supervisor_of",
]

SOCKET_NAME = "supervisor.sock"
"""In the data directory, where the supervisor takes orders."""

ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""A longer answer is none of a gateway's: listings come in pages."""

_LENGTH = struct.Struct(">I")
_PEER_CREDENTIALS = struct.Struct("3i")


class AdminError(BrokerError):
    """The gateway refused a command, or did not answer as a gateway does."""


class NotRunning(AdminError):
    """No instance runs on the data directory."""

    def __init__(self, data: Path) -> None:
        super().__init__(f"no broker runs on {data}; --data names the directory of the one you mean")
        self.data = data


class NoSupervisor(AdminError):
    """An instance runs, and has nobody who could carry out an order: its supervisor has died."""

    def __init__(self, data: Path) -> None:
        super().__init__(
            f"the supervisor of {data} has died, and what it ran goes on without it; "
            "broker serve on the same directory takes that over"
        )
        self.data = data


def supervisor_of(data: Path) -> int | None:
    """Give the process id of the supervisor that runs on the data directory, None when there is none."""
    return next(iter(processes_of(data, "supervisor")), None)


def processes_of(data: Path, kind: str) -> list[int]:
    """Give the process ids of the instance's processes whose name begins with `kind`."""
    return [pid for name, pid in ProcessList(data).surviving() if name.startswith(kind)]


class AdminClient:
    """One connection to a gateway's admin socket; a context manager.

    Raises `NotRunning` when nobody answers there, `AdminError` when it is somebody else's process.
    """

    _door = "gateway.sock"
    _peer = "the gateway"

    def __init__(self, data: Path, *, timeout_seconds: float | None = 10.0) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_seconds)
        try:
            _connect(self._socket, data / self._door)
            self._check_peer()
            self._send({"role": "admin"})
        except OSError as error:
            self._socket.close()
            if isinstance(error, FileNotFoundError | ConnectionRefusedError | NotADirectoryError):
                raise self._nobody(data) from None
            raise AdminError(f"cannot speak to the broker of {data}: {error.strerror or error}") from error
        except BaseException:
            self._socket.close()
            raise

    def _nobody(self, data: Path) -> AdminError:
        return NotRunning(data)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, command: str, **parameters: object) -> Any:
        """Send one command and give its result; parameters that are None are left out.

        Raises `AdminError` with the gateway's words when it refuses, or when it does not answer in time.
        """
        question = {name: value for name, value in parameters.items() if value is not None}
        try:
            self._send({**question, "command": command})
            answer = cbor2.loads(self._receive())
        except TimeoutError:
            raise AdminError(f"{self._peer} does not answer; its log may say why") from None
        except (OSError, EOFError, cbor2.CBORError) as error:
            raise AdminError(f"{self._peer} broke off: {error}") from error
        if not isinstance(answer, dict):
            raise AdminError(f"{self._peer}'s answer is no map")
        if "error" in answer:
            raise AdminError(str(answer["error"]))
        return answer.get("result")

    def pages(self, command: str, rows: str, **parameters: object) -> Iterator[Any]:
        """Give the items of all pages of a listing: the result's `rows`, asked again from its `after` on."""
        after: object = None
        while True:
            result = self.ask(command, after=after, **parameters)
            if not isinstance(result, dict):
                yield from result
                return
            yield from result[rows]
            after = result.get("after")
            if after is None:
                return

    def _check_peer(self) -> None:
        # unix(7), SO_PEERCRED: who it was that listened. Root may serve anybody.
        packed = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
        _, uid, _ = _PEER_CREDENTIALS.unpack(packed)
        if os.geteuid() not in (0, uid) and uid != 0:
            raise AdminError(f"the socket belongs to another user (uid {uid}): nothing was sent to it")

    def _send(self, message: dict[str, object]) -> None:
        body = cbor2.dumps(message)
        self._socket.sendall(_LENGTH.pack(len(body)) + body)

    def _receive(self) -> bytes:
        (length,) = _LENGTH.unpack(self._receive_exactly(_LENGTH.size))
        if length > ANSWER_BYTES_MAX:
            raise EOFError(f"an answer of {length} bytes")
        return self._receive_exactly(length)

    def _receive_exactly(self, length: int) -> bytes:
        parts: list[bytes] = []
        while length:
            part = self._socket.recv(min(length, 1 << 20))
            if not part:
                raise EOFError("it closed the connection")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


class SupervisorClient(AdminClient):
    """One connection to a supervisor, for orders. Without a time limit: the supervisor has one for each of
    its steps, and its death ends the connection.

    Raises `NoSupervisor` when only what it ran is there, and as `AdminClient`.
    """

    _door = SOCKET_NAME
    _peer = "the supervisor"

    def __init__(self, data: Path) -> None:
        super().__init__(data, timeout_seconds=None)

    def _nobody(self, data: Path) -> AdminError:
        return NoSupervisor(data) if ProcessList(data).surviving() else NotRunning(data)


def _connect(client: socket.socket, path: Path) -> None:
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        client.connect(os.fspath(path))
        return
    # A path relative to a descriptor is short, however deep the directory lies; so a command that is run
    # with an absolute path reaches an instance that was started with a relative one.
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        client.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def stop(data: Path, *, timeout_seconds: float = 120.0) -> list[int]:
    """Drain and stop the instance on `data`, and give the ids of the processes that were asked.

    When its supervisor has died, the gateways, then the hosts, then the keeper that it left behind are
    stopped in its place. Returns when they have exited. Raises `NotRunning` or, after `timeout_seconds`,
    `AdminError`.
    """
    deadline = time.monotonic() + timeout_seconds
    listed = ProcessList(data).surviving()
    supervisors = [pid for name, pid in listed if name == "supervisor"]
    if not supervisors and (holder := read_holder(data)) is not None:
        supervisors = [holder.pid]
    if supervisors:
        _terminate(supervisors, deadline)
        return supervisors
    if not listed:
        raise NotRunning(data)
    # The gateway's sockets still have close turns, for the hosts to run; the keeper's duplicates go last.
    groups: list[list[int]] = [[], [], []]
    for name, pid in listed:
        groups[0 if name == "gateway" else 2 if name == "keeper" else 1].append(pid)
    for pids in groups:
        _terminate(pids, deadline)
    return [pid for pids in groups for pid in pids]


def _terminate(pids: list[int], deadline: float) -> None:
    """Send SIGTERM to all and await their exit, by pidfd, so that no number can be somebody else's."""
    with contextlib.ExitStack() as stack:
        waiting: dict[int, int] = {}
        poll = select.poll()
        for pid in pids:
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            stack.callback(os.close, pidfd)
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            except ProcessLookupError:
                continue
            except PermissionError as error:
                raise AdminError(f"process {pid} belongs to another user: it was not stopped") from error
            waiting[pidfd] = pid
            poll.register(pidfd, select.POLLIN)
        while waiting:
            ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
            if not ready:
                late = ", ".join(str(pid) for pid in waiting.values())
                raise AdminError(f"still stopping: process {late}; a second `broker stop` forces it")
            for pidfd, _ in ready:
                poll.unregister(pidfd)
                del waiting[pidfd]
