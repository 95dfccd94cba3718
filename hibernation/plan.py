"""What one instance is to run, and within which times: the facts that all parts of a supervisor share.

Owns `Plan`, `Commands` and `Timing`. It does nothing. Its peers are `hibernation.supervisor` and the modules
beside it.
"""

import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from hibernation.settings import Settings

__all__ = ["KILL_SECONDS", "Commands", "Plan", "Timing"]

KILL_SECONDS = 10.0
"""For the exit of a process after SIGKILL, and for the end of a line, when that has to be awaited."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one instance is to run."""

    app: str
    data: Path
    """The data directory, absolute, locked by the caller for as long as the supervisor runs."""
    listener: socket.socket | None
    """None: the instance is taken over from a supervisor that has died, and its keeper has the listener."""
    settings: Settings
    hosts: int = 1
    shard_count: int = 4
    dev: bool = False
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    bind: tuple[str, int] = ("127.0.0.1", 0)
    """What the operator wants as address, for when `listener` is None; port 0 is any."""


@dataclass(frozen=True, slots=True)
class Commands:
    """The command lines of the children. `-P`: the folder we were started in is not searched for modules,
    so that a `storage/` of the user's own there does not stand in for ours.
    """

    gateway: Sequence[str] = (sys.executable, "-P", "-m", "broker.gateway")
    host: Sequence[str] = (sys.executable, "-P", "-m", "broker.host")
    keeper: Sequence[str] = (sys.executable, "-P", "-m", "hibernation.keeper")


@dataclass(frozen=True, slots=True)
class Timing:
    """Deadlines of the supervisor, in seconds."""

    load_seconds: float = 30.0
    """For a host to import the app and say so. The first gateway, ready when its hosts are, gets twice
    that; a later one as long as it takes, since sockets wait at it."""
    drain_seconds: float = 40.0
    """For a gateway to close its sockets and see their close turns through, before it is killed."""
    finish_seconds: float = 40.0
    """For a host to finish its background work and running turns, before it is killed."""
    alone_seconds: float = 15.0
    """At a stop: for hosts to end, and for a gateway to close its sockets, where what came before has taken
    all of `drain_seconds`."""
    hurry_seconds: float = 5.0
    """Before a host would be killed it is told so: what it then has to cut short, store and put in order."""
    keeper_seconds: float = 5.0
    """For a keeper to answer, and to exit when it is told to."""
    patience_seconds: float = 30.0
    """For the HTTP requests that a gateway has begun with to be answered, before it is replaced."""
    freeze_seconds: float = 10.0
    """For a gateway that is to be replaced to stop reading, commit, and let go of the registry."""
    handover_seconds: float = 10.0
    """For its successor to take everything over and be ready."""
    resume_seconds: float = 5.0
    """For the old one to go on after that has failed, before it is killed."""
    hang_seconds: float | None = None
    """A child that has beaten, and then not for this long, is killed. None: never."""
    spare_seconds: float = 0.2
    """Between a gateway's readiness and the start of the spare one, which costs half a second of work."""
    backoff_first_seconds: float = 0.1
    backoff_limit_seconds: float = 10.0
    backoff_urgent_seconds: float = 0.8
    """The limit for gateways and keepers."""
    backoff_reset_seconds: float = 3.0
    """After a life of this length the waiting begins at its shortest again."""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Give the deadlines that leave the children the `drain` they are promised, and a little."""
        return cls(
            drain_seconds=settings.drain + 10,
            finish_seconds=settings.drain + 10,
            patience_seconds=settings.drain,
            hang_seconds=settings.hang_timeout,
        )
