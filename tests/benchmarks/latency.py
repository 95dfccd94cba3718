"""How long an echo takes while 10,000 connections are parked."""

import random

from tests.benchmarks.figures import Figure, percentile
from tests.benchmarks.load import Load
from tests.benchmarks.running import Broker, Floor

NAME = "latency"
MEDIAN_MS, P99_MS = 1.0, 5.0
PER_ROOM = 10
SETTLE_SECONDS = 2.0


def run(quick: bool) -> list[Figure]:
    count = 1_000 if quick else 10_000
    seconds = 1.0 if quick else 10.0
    chance = random.Random(1)
    figures = []
    with (
        Floor("echo") as floor,
        Broker() as broker,
        Load(floor.port) as bare,
        Load(broker.port) as load,
    ):
        bare.open(["/"] * 1_000)
        load.open([f"/parties/echo/room-{i // PER_ROOM}" for i in range(count)])
        load.ping_pong(messages=1)
        bare.ping_pong(messages=1)
        for name, rate in (("idle", 50), ("at 1,000 messages/s", 1_000)):
            floors = bare.probe(_schedule(chance, rate, seconds, 1_000))
            # Nobody has answered the broker's pings meanwhile: thousands of pongs at once do not count.
            load.idle(SETTLE_SECONDS)
            used = broker.usage()
            latencies = load.probe(_schedule(chance, rate, seconds, count))
            used = broker.usage() - used
            for share, label, target in ((0.5, "median", MEDIAN_MS), (0.99, "p99", P99_MS)):
                figures.append(
                    Figure(
                        NAME,
                        f"{name}, {label}",
                        percentile(latencies, share) * 1000,
                        "ms",
                        target,
                        floor=percentile(floors, share) * 1000,
                        floor_name="bare epoll echo, 1,000 connections",
                        notes={
                            "parked": count,
                            "probes": len(latencies),
                            "max ms": max(latencies) * 1000,
                            "µs CPU/message": used.total / len(latencies),
                        },
                    )
                )
    return figures


def _schedule(chance: random.Random, rate: int, seconds: float, count: int) -> list[tuple[float, int]]:
    """Arrivals of strangers: they come independently of each other and of the answers (Poisson)."""
    now, schedule = 0.0, []
    while (now := now + chance.expovariate(rate)) < seconds:
        schedule.append((now, chance.randrange(count)))
    return schedule
