"""What the supervisor tells its children, and what they tell it.

Owns the records that a gateway, a host and a keeper are started with, their form on the child's standard
input (one line of JSON: never the command line, which every user of the machine can read), and the lines that
a child writes back on its status pipe. It starts no process and reads no setting: its peers are
`hibernation.supervisor` on one side, `broker.gateway.__main__`, `broker.host` and `hibernation.keeper` on the
other; the last reads its line by itself, since it must stay small.
"""

import json
import os
import select
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from hibernation.settings import Settings

__all__ = [
    "GO_FROM_REST_LINE",
    "GO_LINE",
    "GatewayConfig",
    "HostConfig",
    "KeeperConfig",
    "encode_report",
    "report",
]

GO_LINE = b"go\n"
"""What a loaded host, or a loaded successor of a gateway, waits for on its standard input."""

GO_FROM_REST_LINE = b"go, all is kept\n"
"""The same to a gateway's successor while the one before it is at rest, and can go on: what the keeper holds
is complete, or the keeper has died meanwhile."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What one gateway is started with."""

    data: Path
    """The data directory, absolute. The gateway's Unix socket is `gateway.sock` in it."""
    listener_fd: int
    """The listening TCP socket, bound by the supervisor; a restarted gateway gets the same one."""
    status_fd: int
    """The writing end of the pipe for `report`."""
    settings: Settings
    dev: bool
    """Tracebacks to clients, loopback origins, admin pages without a token to loopback peers."""
    address: tuple[str, int]
    """Where the listener is bound."""
    hosts: int
    """How many hosts the instance runs."""
    shard_count: int
    """How many shards the data directory was made with."""
    handover: bool = False
    """It is to report "waiting" when it is loaded, and to open, bind and take nothing before "go" comes."""

    def to_json(self) -> str:
        """Give the record as one line of JSON, without the line's end."""
        return json.dumps(
            {
                "data": os.fspath(self.data),
                "listener_fd": self.listener_fd,
                "status_fd": self.status_fd,
                "settings": self.settings.to_json(),
                "dev": self.dev,
                "address": list(self.address),
                "hosts": self.hosts,
                "shard_count": self.shard_count,
                "handover": self.handover,
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        host, port = fields["address"]
        return cls(
            data=Path(fields["data"]),
            listener_fd=fields["listener_fd"],
            status_fd=fields["status_fd"],
            settings=Settings.from_json(fields["settings"]),
            dev=fields["dev"],
            address=(host, port),
            hosts=fields["hosts"],
            shard_count=fields["shard_count"],
            handover=fields["handover"],
        )


@dataclass(frozen=True, slots=True)
class HostConfig:
    """What one host is started with."""

    data: Path
    """The data directory, absolute."""
    index: int
    """0 up to the number of hosts: keeps its meaning when the host is started again."""
    shards: tuple[int, ...]
    """The shards that this host, and no other, opens."""
    shard_count: int
    app: str
    """`module`, `module:Class` or the path of a file, as the user wrote it."""
    status_fd: int
    """The writing end of the pipe for `report`."""
    settings: Settings
    dev: bool
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    """`--var NAME=VALUE`, for `room.env`: may be secrets, so they show in no repr."""

    def to_json(self) -> str:
        """Give the record as one line of JSON, without the line's end."""
        return json.dumps(
            {
                "data": os.fspath(self.data),
                "index": self.index,
                "shards": list(self.shards),
                "shard_count": self.shard_count,
                "app": self.app,
                "status_fd": self.status_fd,
                "settings": self.settings.to_json(),
                "dev": self.dev,
                "variables": dict(self.variables),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(
            data=Path(fields["data"]),
            index=fields["index"],
            shards=tuple(fields["shards"]),
            shard_count=fields["shard_count"],
            app=fields["app"],
            status_fd=fields["status_fd"],
            settings=Settings.from_json(fields["settings"]),
            dev=fields["dev"],
            variables=fields["variables"],
        )


@dataclass(frozen=True, slots=True)
class KeeperConfig:
    """What a keeper is started with."""

    data: Path
    """The data directory, absolute. The keeper's Unix socket is `keeper.sock` in it."""
    status_fd: int
    """The writing end of the pipe for its one report, `ready` or `error` (with `text`); it closes it then."""

    def to_json(self) -> str:
        """Give the record as one line of JSON, without the line's end."""
        return json.dumps({"data": os.fspath(self.data), "status_fd": self.status_fd})


def encode_report(event: str, **details: object) -> bytes:
    """Give one status line: a JSON object with `event` and the details, ended by a newline."""
    return json.dumps({"event": event, **details}).encode() + b"\n"


def report(status_fd: int, event: str, **details: object) -> None:
    """Write one status line to the supervisor; the events are listed in the module.

    A supervisor that has died is no reason to stop serving (S34), so a broken pipe is ignored; and so is one
    that stands still: a beat that finds no room in the pipe is left out. Every other line is written with one
    call into a pipe that holds little, so the call does not block.
    """
    try:
        if event != "beat" or _has_room(status_fd):
            os.write(status_fd, encode_report(event, **details))
    except OSError:
        return


def _has_room(pipe: int) -> bool:
    """Whether a short line (PIPE_BUF at most) can be written without waiting. Source: pipe(7), poll(2)."""
    poll = select.poll()
    poll.register(pipe, select.POLLOUT)
    return poll.poll(0) == [(pipe, select.POLLOUT)]
