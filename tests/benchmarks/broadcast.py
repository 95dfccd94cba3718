"""Broadcasts: to everybody in a room, and to those with a tag."""

from tests.benchmarks.figures import Figure, middle
from tests.benchmarks.load import FRAME_OUT, Audience, Load, masked
from tests.benchmarks.running import Broker, Floor, Server, cpu_us, stopwatch

NAME = "broadcast"
AUDIENCE = 1_000
TARGET_RATIO = 0.8
#: Broadcasts on their way at a time, so that neither side waits for the client.
WINDOW = 4
MATCHES = (10, 100, 1_000)
#: The audience of another process reads bytes and answers no pings.
UNPINGED = ("--ping-interval-seconds", "600")


def run(quick: bool) -> list[Figure]:
    rounds, broadcasts = (2, 20) if quick else (5, 100)
    with Floor("broadcast") as floor, Broker(options=UNPINGED) as broker:
        target = "/parties/wide/room"
        with (
            Audience(floor.port, ["/"] * (AUDIENCE - 1)) as bare_audience,
            Audience(broker.port, [target] * (AUDIENCE - 1)) as audience,
            Load(floor.port) as bare,
            Load(broker.port) as load,
        ):
            bare.open(["/"])
            load.open([target])
            rates, bare_rates, costs, bare_costs, hosts = [], [], [], [], []
            for _ in range(rounds):
                rate, cost = _measure(floor, bare, bare_audience, broadcasts)
                bare_rates.append(rate)
                bare_costs.append(cost)
                host = broker.usage().host
                rate, cost = _measure(broker, load, audience, broadcasts)
                hosts.append((broker.usage().host - host) / broadcasts)
                rates.append(rate)
                costs.append(cost)
    bare_rate, bare_cost = middle(bare_rates), middle(bare_costs)
    figures = [
        Figure(
            NAME,
            f"to {AUDIENCE:,} sockets",
            middle(rates),
            "deliveries/s",
            TARGET_RATIO * bare_rate,
            "over",
            bare_rate,
            "bare loop of send",
        ),
        Figure(
            NAME,
            f"to {AUDIENCE:,} sockets, gateway",
            middle(costs),
            "µs CPU/delivery",
            floor=bare_cost,
            floor_name="bare loop of send",
            notes={"host µs/broadcast": middle(hosts)},
        ),
    ]
    return figures + _tagged(quick, bare_cost)


def _measure(server: Server, load: Load, audience: Audience, broadcasts: int) -> tuple[float, float]:
    """Deliveries per second, and CPU time of the process that sends for each."""
    deliveries = AUDIENCE * broadcasts
    pid = server.gateways[0] if isinstance(server, Broker) else server.pid
    before = cpu_us(pid)
    with stopwatch() as watch:
        audience.expect((AUDIENCE - 1) * broadcasts * len(FRAME_OUT))
        load.trigger(0, broadcasts, WINDOW)
        audience.wait()
    return deliveries / watch.seconds, (cpu_us(pid) - before) / deliveries


def _tagged(quick: bool, bare_cost_us: float) -> list[Figure]:
    """Broadcasts by tag within one room: what they cost with more and with fewer matches."""
    count = 1_000 if quick else 5_000
    repeats = 20 if quick else 100
    figures = []
    with Broker(options=UNPINGED) as broker, Load(broker.port) as load:
        matches = [number for number in MATCHES if number <= count]
        targets = []
        for index in range(count):
            tags = [f"tag=t{number}" for number in matches if index % (count // number) == 0]
            targets.append(f"/parties/tagged/room?{'&'.join(tags)}")
        load.open(targets)
        for number in matches:
            message = f"=t{number}".encode()
            size = (2 + len(message)) * number
            load.collect(0, masked(message), size, 3)
            before = broker.usage()
            load.collect(0, masked(message), size, repeats)
            used = broker.usage() - before
            figures.append(
                Figure(
                    NAME,
                    f"by tag, {number:,} of {count:,} match",
                    used.gateway / repeats,
                    "µs CPU/broadcast",
                    floor=bare_cost_us * number,
                    floor_name="as many bare sends",
                    notes={"per match": used.gateway / repeats / number, "host": used.host / repeats},
                )
            )
    return figures
