"""What a message costs that wakes a hibernating room, is echoed, and lets it go."""

from tests.benchmarks.figures import Figure, middle
from tests.benchmarks.load import Load
from tests.benchmarks.running import Broker, Floor, stopwatch

NAME = "echo"
TARGET_US = 25.0
CONNECTIONS = 100


def run(quick: bool) -> list[Figure]:
    rounds, messages = (2, 20) if quick else (7, 200)
    figures = []
    with Floor("echo") as floor, Load(floor.port) as bare:
        bare.open(["/"] * CONNECTIONS)
        for name, party, durability, target in (
            ("wake, echo, sleep", "echo", "full", TARGET_US),
            ("the same with one put, durability os", "put", "os", None),
            ("the same with one put, durability full", "put", "full", None),
        ):
            with Broker(durability=durability) as broker, Load(broker.port) as load:
                load.open([f"/parties/{party}/room-{i}" for i in range(CONNECTIONS)])
                load.ping_pong(messages=messages // 10)
                bare.ping_pong(messages=messages // 10)
                bare_us, gateway_us, host_us, rates, busy = [], [], [], [], ""
                wakes = broker.stats()["wakes"]
                for _ in range(rounds):
                    # Taken in turn, so that both meet the machine in the same mood.
                    before = floor.cpu_us()
                    answers = bare.ping_pong(messages=messages)
                    bare_us.append((floor.cpu_us() - before) / answers)
                    used = broker.usage()
                    with stopwatch() as watch:
                        answers = load.ping_pong(messages=messages)
                    used = broker.usage() - used
                    gateway_us.append(used.gateway / answers)
                    host_us.append(used.host / answers)
                    rates.append(answers / watch.seconds)
                    busy = watch.busy
                woken = broker.stats()["wakes"]
                assert isinstance(wakes, int) and isinstance(woken, int)
                figures.append(
                    Figure(
                        NAME,
                        name,
                        middle(map(sum, zip(gateway_us, host_us, strict=True))),
                        "µs CPU/message",
                        target,
                        floor=middle(bare_us),
                        floor_name="bare epoll echo",
                        notes={
                            "gateway": middle(gateway_us),
                            "host": middle(host_us),
                            "messages/s": middle(rates),
                            "wakes/message": (woken - wakes) / (rounds * messages * CONNECTIONS),
                            "client": busy,
                        },
                    )
                )
    return figures
