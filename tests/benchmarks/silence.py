"""How long clients hear nothing when the gateway goes: by an upgrade, by kill -9, and with its spare."""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable

from hibernation.admin import SupervisorClient, processes_of
from tests.benchmarks.figures import Figure, middle
from tests.benchmarks.load import Load
from tests.benchmarks.running import Broker

NAME = "silence"
UPGRADE_MS, DEATH_MS = 250.0, 1000.0
PER_ROOM = 20
#: Clients that talk, each 20 times a second; the others are silent.
TALKERS = 10
#: Of each kind; between two of them everything comes to rest.
ROUNDS = 3
SETTLE_SECONDS = 3.0
SPARE_SECONDS = 30.0
#: Descriptors in one message of the floor (unix(7): at most 253).
BATCH = 250


def run(quick: bool) -> list[Figure]:
    # One descriptor for each in the client, the gateway and the keeper.
    count = 1_000 if quick else 10_000
    figures = []
    with Broker(ends_badly=True) as broker, Load(broker.port) as load:
        load.open([f"/parties/echo/room-{index // PER_ROOM}" for index in range(count)])
        load.ping_pong(messages=1)
        least = _floor_ms(load, count)
        for name, misfortune, target in (
            ("upgrade", lambda: _upgrade(broker), UPGRADE_MS),
            ("kill -9 of the gateway", lambda: _kill(broker, "gateway"), DEATH_MS),
            ("kill -9 of gateway and spare", lambda: _kill(broker, "gateway", "spare"), DEATH_MS),
        ):
            longest = [_longest_ms(broker, load, misfortune) for _ in range(1 if quick else ROUNDS)]
            figures.append(
                Figure(
                    NAME,
                    name,
                    middle(longest),
                    "ms",
                    target,
                    floor=least,
                    floor_name="moving the bare descriptors",
                    notes={"connections": count, "longest": max(longest), "shortest": min(longest)},
                )
            )
    return figures


def _longest_ms(broker: Broker, load: Load, misfortune: Callable[[], None]) -> float:
    deadline = time.monotonic() + SPARE_SECONDS
    while len(processes_of(broker.data, "spare")) != 1:
        if time.monotonic() > deadline:
            raise RuntimeError("no spare gateway has come up")
        time.sleep(0.1)
    load.idle(SETTLE_SECONDS)
    stride = len(load.order) // TALKERS
    steps = [(tick / (20 * TALKERS), tick % TALKERS * stride) for tick in range(int(20 * TALKERS * 4))]
    timer = threading.Timer(1.0, misfortune)
    timer.start()
    longest = max(load.probe(steps))
    timer.join()
    return 1000 * longest


def _upgrade(broker: Broker) -> None:
    with SupervisorClient(broker.data) as client:
        client.ask("upgrade")


def _kill(broker: Broker, *kinds: str) -> None:
    for pid in [pid for kind in kinds for pid in processes_of(broker.data, kind)]:
        os.kill(pid, signal.SIGKILL)


def _floor_ms(load: Load, count: int) -> float:
    """The least that has to be done: so many descriptors go through a Unix socket and into an epoll set."""
    descriptors = load.order[: count // 10]
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    seconds = 0.0
    with here, there:
        for _ in range(10):  # few at a time, since the client holds as many again
            taken: list[int] = []
            with select.epoll() as epoll:
                began = time.perf_counter()
                for start in range(0, len(descriptors), BATCH):
                    socket.send_fds(here, [b"x"], descriptors[start : start + BATCH])
                    _, fds, _, _ = socket.recv_fds(there, 1, BATCH)
                    taken += fds
                    for descriptor in fds:
                        epoll.register(descriptor, select.EPOLLIN | select.EPOLLET)
                seconds += time.perf_counter() - began
            for descriptor in taken:
                os.close(descriptor)
    return 1000 * seconds
