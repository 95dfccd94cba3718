"""Where an instance listens, and what stands in the way of that.

Owns binding and the errors that say why an instance cannot start. Accepts nothing: the listening socket is
the supervisor's, so that a gateway's death closes it to nobody, and connections wait in it meanwhile.
"""

import errno
import resource
import socket
import stat
from pathlib import Path
from typing import Any

from storage.errors import BrokerError

__all__ = [
    "AddressInUse",
    "StartError",
    "bind_listener",
    "raise_file_limit",
    "remove_stale_socket",
    "require_address",
]

LISTEN_BACKLOG = 4096
"""Connections that the kernel completes while a gateway is restarted; the kernel's own limit may be lower."""


class StartError(BrokerError):
    """The instance cannot start. `usage` when it is the app that is wrong, not the machine."""

    def __init__(self, text: str, *, usage: bool = False) -> None:
        super().__init__(text)
        self.usage = usage


class AddressInUse(StartError):
    """Another program listens at the address."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"port {port} of {host or 'all addresses'} is in use by another program")
        self.host = host
        self.port = port


def bind_listener(host: str, port: int, *, receive_buffer_bytes: int) -> socket.socket:
    """Bind and listen at the first address that `host` and `port` mean; port 0 lets the kernel choose.

    Accepted sockets inherit the receive buffer, the inbox of a connection. A fixed size switches the kernel's
    own tuning off, by which a buffer holds anything from 65 to 250 KB of peeked data.

    Raises `AddressInUse`, or `StartError` when the address is none of this machine's or may not be bound.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise StartError(f"no address is known for {host!r}: {error}") from error
    failures: list[OSError] = []
    for family, kind, protocol, _, address in found:
        try:
            return _listen(socket.socket(family, kind, protocol), address, receive_buffer_bytes)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(host, port) from error
            failures.append(error)
    raise StartError(f"cannot listen on {host}:{port}: {failures[0].strerror}") from failures[0]


def _listen(listener: socket.socket, address: Any, receive_buffer_bytes: int) -> socket.socket:
    try:
        # Without it, a restart would wait for the sockets that a former gateway left in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        listener.bind(address)
        listener.listen(LISTEN_BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def require_address(listener: socket.socket, host: str, port: int) -> None:
    """See that a listener which was taken over is bound where the operator wants it; port 0 is any.

    Raises `StartError`: an address can only be changed by a stop and a start.
    """
    bound = listener.getsockname()[:2]
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise StartError(f"no address is known for {host!r}: {error}") from error
    if not any(bound[0] == address[0] and port in (0, bound[1]) for *_, address in found):
        raise StartError(
            f"the instance that is to be taken over listens at {bound[0]} port {bound[1]}, not at "
            f"{host or 'all addresses'} port {port}; give that address, or end it first with broker stop"
        )


def raise_file_limit() -> None:
    """Raise this process's limit of open files to what it may be, for the gateway that inherits it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def remove_stale_socket(path: Path) -> None:
    """Remove what a former gateway left; the caller holds the data directory, so nobody listens there."""
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()
    except FileNotFoundError:
        return
