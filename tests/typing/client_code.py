"""A user's program with every member of the client: test_client_typing.py checks it strictly.

It is written as a user would write it: it imports from `broker.client` alone.
"""

import ssl
from typing import Any

import broker.client
from broker.client import (
    BlockingSocket,
    Closed,
    ConnectError,
    Event,
    FetchResponse,
    Opened,
    PartySocket,
    QueryFailed,
    Refused,
    RetriesExhausted,
    SendBufferFull,
    SocketClosed,
    SocketOptions,
    State,
    retry_by_default,
)


async def token() -> dict[str, str]:
    return {"token": "fresh"}


def offered() -> list[str]:
    return ["chat.v1"]


def should_retry(error: ConnectError) -> bool:
    if isinstance(error, Refused) and error.status == 403:
        wait: float = error.retry_after_seconds
        return wait > 0
    return retry_by_default(error) and not isinstance(error, QueryFailed)


async def talk() -> None:
    context: ssl.SSLContext = ssl.create_default_context()
    async with PartySocket(
        "example.com",
        "lobby",
        party="chat",
        path="a/b",
        prefix="parties",
        protocol="wss",
        id="ana",
        query=token,
        protocols=offered,
        headers={"X-Color": "blue"},
        ssl_context=context,
        should_reconnect=lambda code, reason: code < 4000 and not reason,
        should_retry=should_retry,
        retries_max=None,
        delay_min_seconds=1,
        buffer_messages_max=10,
    ) as socket:
        await socket.wait_open()
        await socket.send("text")
        await socket.send({"any": ["thing", 1]})
        try:
            socket.send_nowait(b"bytes")
        except SendBufferFull as full:
            print(full.limit, full.given)
        message: str | bytes = await socket.receive()
        async for message in socket:
            print(message)
        async for event in socket.events():
            match event:
                case Opened(url=url):
                    print(url.upper())
                case Closed(code=code, reason=reason):
                    print(code + 1, reason.upper())
                case str() as text:
                    print(text.upper())
                case bytes() as data:
                    print(data.hex())
        answer: FetchResponse = await socket.fetch("x", method="POST", json={"a": 1}, query={"b": 2})
        decoded: Any = answer.json()
        print(decoded, answer.status + 1, answer.text.upper(), answer.ok)
        socket.update_properties(room="other", query={"a": 1, "b": None})
        socket.reconnect(4000, "moving")
        unsent: list[str | bytes] = socket.take_unsent()
        error: ConnectError | None = socket.last_error
        ended: Closed | None = socket.last_close
        print(unsent, error, ended, socket.state is State.OPEN, socket.id.upper(), socket.unsent + 1)
        await socket.close(1000, "bye")


def script(options: SocketOptions) -> str | bytes:
    try:
        with broker.client.connect("ws://127.0.0.1:1999/party/lobby", timeout=None, **options) as socket:
            plain: BlockingSocket = socket
            plain.send({"a": 1}, timeout=3)
            for message in plain:
                print(message)
            events: list[Event] = list(plain.events())
            print(events)
            return plain.receive(timeout=5)
    except (SocketClosed, RetriesExhausted, TimeoutError):
        return ""


async def ask() -> int:
    answer = await broker.client.fetch("127.0.0.1:1999", "lobby", query={"a": "1"}, data=b"x", method="PUT")
    return len(answer.body)
