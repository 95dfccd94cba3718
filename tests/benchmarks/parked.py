"""What a parked connection costs in memory."""

from tests.benchmarks.figures import Figure
from tests.benchmarks.load import Load
from tests.benchmarks.running import Broker, Floor, Memory, memory_of

NAME = "parked"
TARGET_BYTES = 1024
#: For the last pages to be written, and freed memory to be given back.
SETTLE_SECONDS = 4.0


def run(quick: bool) -> list[Figure]:
    count = 1_000 if quick else 15_000
    shapes = {
        "one room, two shared tags": ["/parties/tagged/one?tag=red&tag=green"] * count,
        "a room and a tag each": [f"/parties/tagged/room-{i}?tag=tag-{i}" for i in range(count)],
    }
    with Floor("echo") as floor, Load(floor.port) as bare:
        before = memory_of(floor.pid)
        bare.open(["/"] * count)
        bare.ping_pong(messages=10)
        least = (memory_of(floor.pid) - before).pss / count
    figures = []
    for shape, targets in shapes.items():
        with Broker() as broker, Load(broker.port) as load:
            with Load(broker.port) as first:
                # The first connection of all brings in what is loaded or allocated once.
                first.open(["/parties/tagged/warm?tag=red"])
                first.ping_pong(messages=10)
                first.idle(SETTLE_SECONDS)
            before, parts_before = broker.memory(), _parts(broker)
            load.open(targets)
            load.ping_pong(messages=10)
            load.idle(SETTLE_SECONDS)
            grown = broker.memory() - before
            parts = [after - past for after, past in zip(_parts(broker), parts_before, strict=True)]
            cpu = broker.usage()
            seconds = 1.0 if quick else 5.0
            load.idle(seconds)
            idle = broker.usage() - cpu
            figures.append(
                Figure(
                    NAME,
                    shape,
                    grown.pss / count,
                    "B/connection",
                    TARGET_BYTES,
                    floor=least,
                    floor_name="a bare epoll server's socket objects",
                    notes={
                        "connections": count,
                        "anonymous": grown.anonymous / count,
                        "gateway": parts[0].pss / count,
                        "host": parts[1].pss / count,
                        "keeper": parts[2].pss / count,
                        "idle CPU ms/s": idle.total / 1000 / seconds,
                    },
                )
            )
    return figures


def _parts(broker: Broker) -> list[Memory]:
    return [sum(map(memory_of, pids), Memory()) for pids in (broker.gateways, broker.hosts, broker.keepers)]
