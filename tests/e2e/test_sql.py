"""Rooms with a database of their own: statements, inner transactions, death at any moment (S22, S28)."""

import contextlib
import hashlib
import itertools
import json
import random
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import urlopen

import pytest

from tests.e2e.broker_process import BrokerProcess
from tests.e2e.conftest import BrokerFactory
from tests.e2e.raw_client import BINARY, RawClient, encode_frame

pytestmark = pytest.mark.e2e

APP = """
    import hashlib
    import json

    import trio
    from broker import BrokerError, Server

    class Undo(Exception):
        pass

    class Main(Server):
        '''Carries out steps, and answers with what they gave.'''

        async def on_message(self, message, sender):
            sender.send(await self.steps(json.loads(message)))

        async def steps(self, steps):
            storage = self.room.storage
            results = []
            for step in steps:
                match step:
                    case ["sql", query, *parameters]:
                        results.append(await storage.sql(query, *parameters))
                    case ["try", query, *parameters]:
                        try:
                            results.append(await storage.sql(query, *parameters))
                        except BrokerError as error:
                            results.append(f"{type(error).__name__}: {error}")
                    case ["put", key, value]:
                        storage.put(key, value)
                    case ["get", key]:
                        results.append(await storage.get(key, "missing"))
                    case ["list"]:
                        results.append(list((await storage.list()).items()))
                    case ["delete", key]:
                        results.append(await storage.delete(key))
                    case ["clear"]:
                        storage.delete_all()
                    case ["keep", inner]:
                        async with storage.transaction():
                            results += await self.steps(inner)
                    case ["undo", inner]:
                        try:
                            async with storage.transaction():
                                results += await self.steps(inner)
                                raise Undo
                        except Undo:
                            pass
                    case ["wait"]:
                        await trio.sleep(0.002)
                    case ["hibernate"]:
                        self.room.hibernate()
                    case ["fail"]:
                        raise ValueError("as asked")
            return results

        def on_error(self, connection, error):
            connection.send(["failed", type(error).__name__])

    class Resident(Main):
        idle_seconds = 1000

    class Quick(Main):
        sql_timeout = 0.2

    class Counting(Server):
        '''Counts what it is sent, in a table and under a key, and tells its sender both.'''

        async def on_message(self, message, sender):
            storage = self.room.storage
            if message == "read":
                sender.send(f"read {len(await storage.list())}")
                return
            digest = hashlib.sha1(message).hexdigest()
            if message[0] % 4 == 0:
                count = await storage.get(sender.id, 0)
            else:
                await storage.sql("CREATE TABLE IF NOT EXISTS heard (client TEXT, digest TEXT)")
                await storage.sql("INSERT INTO heard VALUES (?, ?)", sender.id, digest)
                await storage.sql("SELECT count(*) AS total FROM heard")
                count = await storage.get(sender.id, 0)
            storage.put(sender.id, count + 1)
            sender.send(f"{count + 1} {digest}")
            self.room.broadcast(f"{sender.id} {count + 1}", tag="listener")

        async def on_request(self, request):
            rows = await self.room.storage.sql("SELECT client, digest FROM heard ORDER BY rowid")
            return [[row["client"], row["digest"]] for row in rows]
"""

CREATE = "CREATE TABLE IF NOT EXISTS t (id INTEGER PRIMARY KEY, name TEXT UNIQUE)"
NAMES = "SELECT name FROM t ORDER BY id"

numbers = itertools.count()


@pytest.fixture(scope="module", params=["full", "os"])
def site(request: pytest.FixtureRequest, module_broker: BrokerFactory) -> BrokerProcess:
    return module_broker(APP, durability=request.param)


@pytest.fixture
def room() -> str:
    return f"room-{next(numbers)}"


@pytest.fixture(params=["main", "resident"])
def client(request: pytest.FixtureRequest, site: BrokerProcess, room: str) -> Iterator[RawClient]:
    with site.connect(f"/parties/{request.param}/{room}") as made:
        yield made


def do(client: RawClient, *steps: list[Any]) -> Any:
    client.send(json.dumps(steps))
    return json.loads(client.receive())


def test_a_room_that_begins_to_use_sql_keeps_its_keys(client: RawClient) -> None:
    """S28: they move to its own database, with what the turn writes; and later turns write there."""
    do(client, *[["put", f"k{number}", number] for number in range(200)])
    first = [["put", "k0", "new"], ["delete", "k1"], ["sql", CREATE], ["get", "k0"], ["get", "k7"]]
    assert do(client, *first) == [True, [], "new", 7]
    assert do(client, ["get", "k0"], ["get", "k1"], ["get", "k199"]) == ["new", "missing", 199]
    assert do(client, ["sql", "INSERT INTO t (name) VALUES (?), (?)", "a", "b"], ["put", "k2", "x"]) == [[]]
    assert do(client, ["sql", NAMES], ["get", "k2"]) == [[{"name": "a"}, {"name": "b"}], "x"]
    assert len(do(client, ["list"])[0]) == 199


def test_a_turn_that_fails_leaves_neither_rows_nor_keys(client: RawClient) -> None:
    """S20, S28."""
    do(client, ["sql", CREATE], ["sql", "INSERT INTO t (name) VALUES ('a')"], ["put", "k", 1])
    assert do(
        client,
        ["sql", "INSERT INTO t (name) VALUES ('b')"],
        ["put", "k", 2],
        ["sql", "DROP TABLE t"],
        ["fail"],
    ) == ["failed", "ValueError"]
    assert do(client, ["sql", NAMES], ["get", "k"]) == [[{"name": "a"}], 1]


def test_inner_transactions_undo_keys_and_rows_alike(client: RawClient) -> None:
    """S28: whichever comes first, and one in another."""
    insert = "INSERT INTO t (name) VALUES (?)"
    assert do(
        client,
        ["undo", [["put", "early", 1]]],
        ["put", "kept", 1],
        ["undo", [["put", "kept", 2], ["sql", CREATE], ["sql", insert, "gone"]]],
        ["sql", CREATE],
        [
            "keep",
            [["sql", insert, "a"], ["undo", [["sql", insert, "b"], ["delete", "kept"]]], ["put", "c", 1]],
        ],
        ["undo", [["keep", [["sql", insert, "d"], ["put", "d", 1]]]]],
        ["undo", [["clear"], ["get", "kept"]]],
        ["sql", NAMES],
        ["list"],
    ) == [[], [], [], [], [], True, [], "missing", [{"name": "a"}], [["c", 1], ["kept", 1]]]
    assert do(client, ["sql", NAMES], ["list"]) == [[{"name": "a"}], [["c", 1], ["kept", 1]]]


def test_delete_all_takes_tables_too(client: RawClient) -> None:
    """S27: in a turn that has used SQL before, after or not at all."""
    fill: list[Any] = [["sql", CREATE], ["sql", "INSERT INTO t (name) VALUES ('a')"], ["put", "k", 1]]
    tables = ["sql", "SELECT count(*) AS n FROM sqlite_schema WHERE name IN ('t', 'r', 'v')"]
    do(client, *fill, ["sql", "CREATE TABLE r (t REFERENCES t)"], ["sql", "INSERT INTO r VALUES (1)"])
    assert do(client, ["sql", "CREATE VIEW v AS SELECT * FROM t"], ["clear"], tables, ["list"]) == [
        [], [{"n": 0}], [],
    ]  # fmt: skip
    do(client, *fill)
    assert do(client, ["clear"], ["put", "new", 1]) == []
    assert do(client, tables, ["list"]) == [[{"n": 0}], [["new", 1]]]
    do(client, *fill)
    assert do(client, ["clear"], *fill[:1], ["sql", NAMES]) == [[], []]
    assert do(client, tables) == [[{"n": 1}]]
    assert do(client, ["clear"], ["fail"]) == ["failed", "ValueError"]
    assert do(client, tables) == [[{"n": 1}]]


def test_a_statement_that_takes_too_long_costs_its_turn_nothing_else(site: BrokerProcess, room: str) -> None:
    """S28: also where SQLite then undoes more than that statement; the host lives."""
    insert = "INSERT INTO t (name) VALUES (?)"
    endless = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) "
    with site.connect(f"/parties/quick/{room}") as client:
        hosts = site.host_pids()
        do(client, ["sql", CREATE])
        first, *rest = do(
            client,
            ["try", endless + "SELECT count(*) FROM c"],
            ["sql", insert, "a"],
            ["keep", [["sql", insert, "b"], ["try", endless + "INSERT INTO t SELECT x + 9, x FROM c"]]],
            ["sql", NAMES],
        )  # fmt: skip
        assert "longer than 0.2 s" in first
        assert rest[0:2] == [[], []]
        assert "longer than 0.2 s" in rest[2]
        assert do(client, ["sql", NAMES]) == [[{"name": "a"}, {"name": "b"}]]
        assert site.host_pids() == hosts


def test_turns_of_one_room_follow_each_other(client: RawClient) -> None:
    """S19, S22: hundreds in flight, some of which fail, against a model."""
    chance = random.Random(3)
    do(client, ["sql", CREATE])
    names: list[str] = []
    keys: dict[str, int] = {}
    expected: list[Any] = []
    for number in range(200):
        match chance.randrange(6):
            case 0:
                client.send(json.dumps([["put", "k", number], ["get", "k"]]))
                keys["k"] = number
                expected.append([number])
            case 1:
                client.send(json.dumps([["sql", "INSERT INTO t (name) VALUES (?)", f"{number}"], ["fail"]]))
                expected.append(["failed", "ValueError"])
            case 2:
                client.send(json.dumps([["sql", NAMES], ["hibernate"]]))
                expected.append([[{"name": name} for name in names]])
            case 3:
                client.send(json.dumps([["get", "k"], ["wait"]]))
                expected.append([keys.get("k", "missing")])
            case _:
                names.append(f"{number}")
                client.send(
                    json.dumps(
                        [["sql", "INSERT INTO t (name) VALUES (?) RETURNING name", names[-1]], ["wait"]]
                    )
                )
                expected.append([[{"name": names[-1]}]])
    assert [json.loads(client.receive()) for _ in expected] == expected


def test_files_are_private_and_named_by_a_hash(site: BrokerProcess) -> None:
    """S39: whatever the room is called."""
    name = "..%2f..%2fetc%2fpasswd"
    with site.connect(f"/party/{name}") as client:
        assert do(client, ["sql", CREATE]) == [[]]
    folder = site.data / "rooms"
    files = 0
    for path in [folder, *folder.rglob("*")]:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            continue  # a log of SQLite's, which goes with the last who has its database open
        if stat.S_ISDIR(mode):
            assert stat.S_IMODE(mode) == 0o700
        else:
            assert stat.S_IMODE(mode) == 0o600
            assert len(path.name.partition(".")[0]) == 40
            files += 1
    assert files


KILLS = 3
#: Messages of one client that are not answered: each costs a commit.
OUTSTANDING_MAX = 10


def test_each_message_counts_once_whenever_the_host_is_killed(site: BrokerProcess) -> None:
    """S22, S28: the first statement, the move of the keys, later commits; in the table as in the answers."""
    rooms = [f"r{number % 3}" for number in range(4)]
    with contextlib.ExitStack() as open_clients:
        clients = [
            open_clients.enter_context(site.connect(f"/parties/counting/{room}?_pk=c{number}"))
            for number, room in enumerate(rooms)
        ]
        for client in clients:
            client.timeout_seconds = 60
        count_through_deaths(site, rooms, clients)
    assert "a handler of the gateway failed" not in site.log
    assert "a result could not be carried out" not in site.log


def count_through_deaths(site: BrokerProcess, rooms: list[str], clients: list[RawClient]) -> None:
    stop = threading.Event()
    chance = random.Random(11)
    sent: list[list[str]] = [[] for _ in clients]
    heard: list[list[str]] = [[] for _ in clients]
    tabled: list[list[str]] = [[] for _ in clients]

    def send(number: int) -> None:
        own = random.Random(number)
        while not stop.is_set():
            if len(sent[number]) > len(heard[number]) + OUTSTANDING_MAX:
                time.sleep(0.001)  # those in flight at the last death are enough
                continue
            message = own.randbytes(own.choice([1, 50, 2000]))
            digest = hashlib.sha1(message).hexdigest()
            sent[number].append(digest)
            if message[0] % 4:
                tabled[number].append(digest)
            clients[number].send_bytes(encode_frame(BINARY, message))
        clients[number].send("read")  # of which the answer is the last

    def listen(number: int) -> None:
        while not (answer := str(clients[number].receive())).startswith("read "):
            heard[number].append(answer)

    with ThreadPoolExecutor(2 * len(clients)) as pool:
        doing = [pool.submit(send, number) for number in range(len(clients))]
        doing += [pool.submit(listen, number) for number in range(len(clients))]
        try:
            for _ in range(KILLS):
                time.sleep(chance.random() / 4)  # not for a condition: the moment of death is to be any
                site.kill_host()
        finally:
            stop.set()
        for each in doing:
            each.result()
    for told, digests in zip(heard, sent, strict=True):
        assert told == [f"{count} {digest}" for count, digest in enumerate(digests, 1)]
        assert len(told) > KILLS
    for room in set(rooms):
        with urlopen(site.url(f"/parties/counting/{room}"), timeout=20) as answer:
            stored = json.load(answer)
        for number, of in enumerate(rooms):
            if of == room:
                assert [digest for name, digest in stored if name == f"c{number}"] == tabled[number]
