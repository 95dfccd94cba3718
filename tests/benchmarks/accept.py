"""How fast connections come in, their rows in the registry included."""

from tests.benchmarks.figures import Figure, middle
from tests.benchmarks.load import Load
from tests.benchmarks.running import Broker, Floor, stopwatch

NAME = "accept"
TARGET_PER_SECOND = 5_000


def run(quick: bool) -> list[Figure]:
    count, rounds = (1_000, 1) if quick else (15_000, 2)
    shapes = {
        "one room": ["/parties/echo/one"] * count,
        "a room each": [f"/parties/echo/room-{i}" for i in range(count)],
        "a room and a tag each": [f"/parties/tagged/room-{i}?tag=tag-{i}" for i in range(count)],
    }
    figures = []
    for shape, targets in shapes.items():
        rates, bare_rates, gateway_us, host_us, bare_us, busy = [], [], [], [], [], ""
        for _ in range(rounds):
            with Floor("echo") as floor, Load(floor.port) as bare:
                before = floor.cpu_us()
                with stopwatch() as watch:
                    bare.open(targets)
                bare_us.append((floor.cpu_us() - before) / count)
                bare_rates.append(count / watch.seconds)
            with Broker(durability="full") as broker, Load(broker.port) as load:
                with Load(broker.port) as first:
                    first.open(targets[:1])
                    first.idle(0.2)
                used = broker.usage()
                with stopwatch() as watch:
                    load.open(targets)
                used = broker.usage() - used
                busy = watch.busy
                rates.append(count / watch.seconds)
                gateway_us.append(used.gateway / count)
                host_us.append(used.host / count)
        figures.append(
            Figure(
                NAME,
                shape,
                middle(rates),
                "connections/s",
                TARGET_PER_SECOND,
                "over",
                middle(bare_rates),
                "bare accept and answer",
                notes={
                    "connections": count,
                    "gateway µs": middle(gateway_us),
                    "host µs": middle(host_us),
                    "bare µs": middle(bare_us),
                    "client": busy,
                },
            )
        )
    return figures
