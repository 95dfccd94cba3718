"""demo, dev, serve: commands that start an instance and stay until it stops.

Owns what is decided before the supervisor runs: settings, data directory, address; and what is printed. Its
peer is `hibernation.supervisor`.
"""

import contextlib
import functools
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import trio

from broker.app import app_folder
from broker.cli.options import (
    SettingsCommand,
    data_option,
    settings_options,
    split_settings,
    variables_option,
)
from broker.cli.watching import saves
from hibernation.listener import AddressInUse, StartError, bind_listener, raise_file_limit
from hibernation.logs import configure, protect_standard_streams
from hibernation.processes import ProcessList
from hibernation.settings import Settings
from hibernation.supervisor import Plan, Supervisor
from storage.directory import DataDirectory, socket_path

__all__ = ["COMMANDS"]

DEMO_APP = Path(__file__).resolve().parent.parent / "demo" / "chat.py"


class _Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT, [IPv6]:PORT or :PORT."""

    name = "HOST:PORT"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        host, colon, port = str(value).rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            self.fail(f"{value!r}: write an IPv6 address in brackets, as in [::1]:1999", param, ctx)
        if not colon or not (port.isascii() and port.isdigit()) or int(port) > 65535:
            self.fail(f"{value!r}: give HOST:PORT, such as 127.0.0.1:1999", param, ctx)
        return host, int(port)


_PORT = click.IntRange(0, 65535)
_ONE_OR_MORE = click.IntRange(min=1)


@click.command(cls=SettingsCommand)
@click.option("--port", type=_PORT, default=1999, show_default=True, help="0: any that is free.")
@settings_options
def demo(port: int, **given: Any) -> None:
    """Run a chat to look at. Its data is removed when it stops."""
    settings = Settings.from_sources(split_settings(given), os.environ)
    folder = Path(tempfile.mkdtemp(prefix="broker-demo-"))
    # `make demo` activates no environment: there the command has to be named by its path.
    command = "broker" if shutil.which("broker") or Path(sys.argv[0]).name != "broker" else sys.argv[0]

    def welcome(url: str) -> None:
        click.echo(f"\n  A chat runs at  {click.style(url + '/', bold=True)}")
        click.echo("  Open it in two tabs, write something, and watch the room fall asleep between messages.")
        click.echo(f"  Its code is     {DEMO_APP}")
        click.echo("                  Save a change of it while you chat: nobody is dropped.")
        click.echo(f"  Look inside     {command} rooms --data {folder}")
        click.echo("  Ctrl-C stops it.\n")

    try:
        _run(
            app=str(DEMO_APP),
            host="127.0.0.1",
            port=port,
            data=folder,
            settings=settings,
            dev=True,
            welcome=welcome,
            other_port=f"broker demo --port {_other(port)}",
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@click.command(cls=SettingsCommand)
@click.argument("app")
@click.option("--port", type=_PORT, default=1999, show_default=True, help="0: any that is free.")
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@data_option
@variables_option
@settings_options
def dev(app: str, port: int, host: str, data: Path, variables: dict[str, str], **given: Any) -> None:
    """Serve APP and reload it on save. No socket closes when it is reloaded.

    APP is a module, module:Class or path/to/file.py.
    """
    _run(
        app=app,
        host=host,
        port=port,
        data=data,
        settings=Settings.from_sources(split_settings(given), os.environ),
        variables=variables,
        dev=True,
        other_port=f"--port {_other(port)}",
    )


@click.command(cls=SettingsCommand)
@click.argument("app")
@click.option("--bind", type=_Address(), default="127.0.0.1:1999", show_default=True, help="Where to listen.")
@click.option(
    "--hosts", type=click.IntRange(min=1), default=1, show_default=True, help="Processes for room code."
)
@click.option(
    "--gateways", type=int, default=1, show_default=True, help="Processes for sockets; only 1 so far."
)
@data_option
@variables_option
@settings_options
def serve(
    app: str,
    bind: tuple[str, int],
    hosts: int,
    gateways: int,
    data: Path,
    variables: dict[str, str],
    **given: Any,
) -> None:
    """Serve APP. SIGTERM or Ctrl-C drains and stops; a second one forces.

    APP is a module, module:Class or path/to/file.py.
    """
    if gateways != 1:
        raise click.BadParameter(
            "more than one gateway is not available in this version; leave it at 1", param_hint="--gateways"
        )
    host, port = bind
    _run(
        app=app,
        host=host,
        port=port,
        data=data,
        hosts=hosts,
        settings=Settings.from_sources(split_settings(given), os.environ),
        variables=variables,
        other_port=f"--bind {_shown(host, _other(port))}",
    )


def _run(
    *,
    app: str,
    host: str,
    port: int,
    data: Path,
    settings: Settings,
    other_port: str,
    hosts: int = 1,
    variables: dict[str, str] | None = None,
    dev: bool = False,
    welcome: Callable[[str], None] | None = None,
) -> None:
    """Start an instance and return when it has stopped."""
    protect_standard_streams()
    configure(dev)
    os.umask(0o077)
    raise_file_limit()
    data = data.absolute()
    socket_path(data)

    def announce(address: tuple[str, int]) -> None:
        directory.announce(*address)
        url = f"http://{_shown(*address)}"
        if welcome is not None:
            welcome(url)
        sys.stdout.write(f"ready on {url}\n")
        sys.stdout.flush()

    with DataDirectory(data) as directory:
        if hosts > directory.shard_count:
            raise StartError(
                f"--hosts {hosts}: each host needs a shard, and {data} has {directory.shard_count}",
                usage=True,
            )
        listener: socket.socket | None = None
        if not ProcessList(
            data
        ).surviving():  # else the supervisor takes over, and has the listener from there
            try:
                listener = bind_listener(host, port, receive_buffer_bytes=settings.receive_buffer_bytes)
            except AddressInUse as error:
                raise StartError(f"{error}; choose another with {other_port}") from error
            directory.announce(*listener.getsockname()[:2])
        with listener or contextlib.nullcontext():
            plan = Plan(
                app=app,
                data=data,
                listener=listener,
                bind=(host, port),
                settings=settings,
                hosts=hosts,
                shard_count=directory.shard_count,
                dev=dev,
                variables=variables or {},
            )
            changes = functools.partial(saves, app_folder(app), without=data) if dev else None
            trio.run(Supervisor(plan, announce=announce, changes=changes).run)


def _other(port: int) -> int:
    return port + 1 if port < 65535 else port - 1


def _shown(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


COMMANDS = (demo, dev, serve)
