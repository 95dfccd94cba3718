"""The supervisor's door, and its line to the gateway: real Unix sockets, one process."""

import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from hibernation.admin import SOCKET_NAME
from hibernation.control import CLIENTS_MAX, Control, OrderRefused
from hibernation.gateway_line import GatewayLine, LineError
from hibernation.link import StreamDecoder, encode
from storage.directory import SOCKET_PATH_BYTES_MAX
from tests.hibernation.stage import order, refused

Answer = Callable[[Any, int], object]


async def with_control(data: Path, orders: Mapping[str, Any], script: Callable[[], Awaitable[None]]) -> None:
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(Control(data, orders).serve)
            await script()
            nursery.cancel_scope.cancel()


async def echo(given: Mapping[str, Any]) -> dict[str, Any]:
    await trio.lowlevel.checkpoint()
    return {"given": given["value"]}


def test_an_order_is_answered_and_the_socket_is_its_owners_alone(tmp_path):
    """S39."""

    async def script():
        assert (tmp_path / SOCKET_NAME).stat().st_mode & 0o777 == 0o600
        assert await order(tmp_path, "echo", value=7) == {"given": 7}
        assert await order(tmp_path, "echo", value=8) == {"given": 8}

    (tmp_path / SOCKET_NAME).touch()  # FAULTS 42: what a killed one has left is in nobody's way
    trio.run(with_control, tmp_path, {"echo": echo}, script)
    assert not (tmp_path / SOCKET_NAME).exists()


def test_a_path_too_long_for_the_kernel_is_bound_all_the_same(tmp_path):
    """FAULTS 41: the data directory's depth was measured for a shorter name."""
    deep = tmp_path / ("d" * (SOCKET_PATH_BYTES_MAX - len(str(tmp_path)) - len("/") - len("/gateway.sock")))
    deep.mkdir()
    assert len(str(deep / SOCKET_NAME)) > SOCKET_PATH_BYTES_MAX >= len(str(deep / "gateway.sock"))

    async def script():
        assert await order(deep, "echo", value=7) == {"given": 7}

    trio.run(with_control, deep, {"echo": echo}, script)


def test_a_fault_in_an_order_costs_that_order_alone(tmp_path):
    async def broken(_: Mapping[str, Any]) -> dict[str, Any]:
        raise ZeroDivisionError("a fault of ours")

    async def script():
        with refused("the supervisor failed: ZeroDivisionError: a fault of ours"):
            await order(tmp_path, "broken")
        assert await order(tmp_path, "echo", value=7) == {"given": 7}

    trio.run(with_control, tmp_path, {"broken": broken, "echo": echo}, script)


def test_an_order_goes_on_when_its_client_leaves(tmp_path):
    begun, release, done = trio.Event(), trio.Event(), trio.Event()

    async def slow(_: Mapping[str, Any]) -> dict[str, Any]:
        begun.set()
        await release.wait()
        done.set()
        return {}

    async def script():
        client = await trio.open_unix_socket(tmp_path / SOCKET_NAME)
        await client.send_all(encode({"role": "admin"}) + encode({"command": "slow"}))
        await begun.wait()
        await client.aclose()
        await wait_all_tasks_blocked()
        with refused("slow is under way"):
            await order(tmp_path, "echo", value=1)
        release.set()
        await done.wait()
        await wait_all_tasks_blocked()
        assert await order(tmp_path, "echo", value=7) == {"given": 7}

    trio.run(with_control, tmp_path, {"slow": slow, "echo": echo}, script)


@pytest.mark.parametrize("sent", [b"\xff" * 8, encode([1]), encode({"command": 7}), b"\x00\x00"])
def test_nonsense_ends_the_connection_or_is_refused_and_nothing_else(tmp_path, sent):
    async def script():
        client = await trio.open_unix_socket(tmp_path / SOCKET_NAME)
        async with client:
            await client.send_all(sent)
            await client.send_eof()
            while await client.receive_some():
                pass
        assert await order(tmp_path, "echo", value=7) == {"given": 7}

    trio.run(with_control, tmp_path, {"echo": echo}, script)


def test_clients_beyond_the_limit_are_turned_away(tmp_path):
    async def script():
        path = tmp_path / SOCKET_NAME
        held = [await trio.open_unix_socket(path) for _ in range(CLIENTS_MAX)]
        await wait_all_tasks_blocked()
        async with await trio.open_unix_socket(path) as beyond:
            assert await beyond.receive_some() == b""
        for client in held:
            await client.aclose()
        await wait_all_tasks_blocked()
        assert await order(tmp_path, "echo", value=7) == {"given": 7}

    trio.run(with_control, tmp_path, {"echo": echo}, script)


def test_whoever_waits_has_the_turn_after_the_other(tmp_path):
    control = Control(tmp_path, {})
    seen: list[str] = []

    async def wait() -> None:
        async with control.turn("second", wait=True):
            seen.append("second")

    async def main():
        async with trio.open_nursery() as nursery:
            async with control.turn("first", wait=False):
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                with pytest.raises(OrderRefused, match="first is under way"):
                    async with control.turn("third", wait=False):
                        pass
                seen.append("first")

    trio.run(main)
    assert seen == ["first", "second"]


# The line to a gateway


async def with_gateway(
    path: Path, answer: Callable[[trio.SocketStream, Any], Awaitable[None]], script: Callable[[], Any]
) -> None:
    """Run `script` with somebody at `path` who treats each order as told."""

    async def serve(stream: trio.SocketStream) -> None:
        decoder = StreamDecoder()
        try:
            while data := await stream.receive_some():
                decoder.feed(data)
                for value in decoder:
                    if "command" in value:
                        await answer(stream, value)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    listening = trio.socket.socket(socket.AF_UNIX)
    await listening.bind(os.fspath(path))
    listening.listen()
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listening)])
            await script()
            nursery.cancel_scope.cancel()


def test_a_late_answer_is_passed_over_by_the_next_question(tmp_path):
    """A gateway that freezes too late is resumed on the same line."""
    release = trio.Event()

    async def answer(stream: trio.SocketStream, value: Any) -> None:
        if value["command"] == "freeze":
            await release.wait()
        await stream.send_all(encode({"result": value["command"]}))

    async def script():
        line = await GatewayLine.connect(tmp_path / "g", 5)
        assert line.pid == os.getpid()
        with pytest.raises(LineError, match=r"did not answer 'freeze' within 0\.05 s") as raised:
            await line.ask("freeze", 0.05)
        assert not raised.value.broken
        release.set()
        assert await line.ask("resume", 5) == "resume"
        assert await line.ask("leave", 5) == "leave"
        await line.aclose()

    trio.run(with_gateway, tmp_path / "g", answer, script)


@pytest.mark.parametrize(
    ("reply", "text", "broken"),
    [
        (encode({"error": "unknown command 'freeze'"}), "refused 'freeze': unknown command", False),
        (encode([1]), "is no map", True),
        (b"\x00\x00\x00\x01\xff", "broke off at 'freeze'", True),
        (None, "broke off at 'freeze'", True),
    ],
)
def test_what_is_no_answer_is_told(tmp_path, reply, text, broken):
    async def answer(stream: trio.SocketStream, _: Any) -> None:
        if reply is None:
            await stream.aclose()
        else:
            await stream.send_all(reply)

    async def script():
        line = await GatewayLine.connect(tmp_path / "g", 5)
        with pytest.raises(LineError, match=text) as raised:
            await line.ask("freeze", 5)
        assert raised.value.broken is broken
        await line.aclose()

    trio.run(with_gateway, tmp_path / "g", answer, script)


def test_a_gateway_that_is_not_there_is_told(tmp_path):
    async def main():
        with pytest.raises(LineError, match="cannot be reached") as raised:
            await GatewayLine.connect(tmp_path / "g", 5)
        assert raised.value.broken

    trio.run(main)
