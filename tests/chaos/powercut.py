"""`python -m tests.chaos powercut`: would what a host has said survive the loss of power?

kill -9 proves nothing about disks: what a dead process has written is still in the kernel. So a host is run
under strace, which logs what it writes to its shards, when it synchronises them, and what it says to the
gateway. Afterwards, for moments at which it said something, its files are rebuilt as a power cut might leave
them: all writes that a finished fdatasync covers, and of the others a random part, some of them torn at a
512-byte boundary. Each is opened, checked, and compared with what had been said until then.

Owns the model and the scenario: rooms that count their messages in storage and answer with the count. With
durability `full` nothing may be missing. With `os` something must be: else the instrument sees nothing.

What the model does not know: files that are created in between keep their directory entry, and a drive that
lies about its cache. Source: sqlite.org/atomiccommit.html, sections 2 and 9.
"""

import argparse
import contextlib
import random
import re
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from storage.values import decode
from tests.chaos.instance import Instance
from tests.e2e.raw_client import TEXT, RawClient, encode_frame
from tests.tracing import traced

__all__ = ["Cut", "Operation", "Trace", "main", "parse", "record", "violations"]

APP = """
import os

from broker import Server


class Main(Server):
    async def on_message(self, message, sender):
        count = await self.room.storage.get("count", 0) + 1
        self.room.storage.put({"count": count, "padding": os.urandom(int(message))})
        sender.send(f"ack {self.room.id} {count};")
"""
SECTOR = 512
CALLS = "pwrite64,fdatasync,fsync,ftruncate,sendto,sendmsg,write"
_ACK = re.compile(rb"ack (\w+) (\d+);")
_LINE = re.compile(r"^(\d+) +(?:(\w+)\((\d+)<([^>]*)>(.*)|<\.\.\. (\w+) resumed>(.*))$")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass
class Operation:
    """One change of a file; `synced`: a power cut keeps it for certain."""

    path: str
    offset: int
    data: bytes | None
    """None: the file ends at `offset` from now on."""
    synced: bool = False


@dataclass
class Cut:
    """A moment at which the host said something: how far the writes had come, and what was said so far."""

    operations: int
    synced: frozenset[int]
    said: dict[str, int]


@dataclass
class Trace:
    """What a host did: its files at the beginning, its writes, the moments at which it spoke."""

    base: dict[str, bytes]
    operations: list[Operation] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)


def _bytes(text: str) -> bytes:
    return b"".join(bytes.fromhex(part.replace("\\x", "")) for part in _STRING.findall(text))


def parse(lines: Sequence[str], base: dict[str, bytes], folder: str) -> Trace:
    """Read what strace wrote (`-f -yy -xx`) about files below `folder` and about sockets."""
    trace = Trace(dict(base))
    operations = trace.operations
    said: dict[str, int] = {}
    #: For each thread that is inside of fdatasync: the operations that it covers if it succeeds.
    syncing: dict[str, list[int]] = {}
    for line in lines:
        found = _LINE.match(line)
        if found is None:
            continue
        thread, call, _, name, rest, resumed, result = found.groups()
        if resumed in ("fdatasync", "fsync"):
            covered = syncing.pop(thread, [])
            if result.rstrip().endswith("= 0"):
                for index in covered:
                    operations[index].synced = True
            continue
        if call is None:
            continue
        path = _bytes(f'"{name}"').decode() if name.startswith("\\x") else name
        ours = path.startswith(folder) and not path.endswith("-shm")
        if call == "pwrite64" and ours:
            data = _bytes(rest)
            offset = re.search(r", (\d+)(?:\) += \d+| <unfinished \.\.\.>)\s*$", rest)
            assert offset is not None, line
            operations.append(Operation(path, int(offset[1]), data))
        elif call == "ftruncate" and ours:
            size = re.match(r", (\d+)", rest)
            assert size is not None, line
            operations.append(Operation(path, int(size[1]), None))
        elif call in ("fdatasync", "fsync") and ours:
            covered = [
                index for index, each in enumerate(operations) if each.path == path and not each.synced
            ]
            if "<unfinished" in rest:
                syncing[thread] = covered
            elif rest.rstrip().endswith("= 0"):
                for index in covered:
                    operations[index].synced = True
        elif call in ("sendto", "sendmsg", "write") and name.startswith("UNIX"):
            acks = _ACK.findall(_bytes(rest))
            if acks:
                for room, count in acks:
                    said[room.decode()] = max(said.get(room.decode(), 0), int(count))
                synced = frozenset(index for index, each in enumerate(operations) if each.synced)
                trace.cuts.append(Cut(len(operations), synced, dict(said)))
    return trace


def rebuild(trace: Trace, cut: Cut, chance: random.Random, keep: float) -> dict[str, bytes]:
    """The files after a power cut at this moment; `keep`: which part of the other writes was done."""
    files = {path: bytearray(data) for path, data in trace.base.items()}
    for index, operation in enumerate(trace.operations[: cut.operations]):
        data = operation.data
        if index not in cut.synced:
            if chance.random() >= keep:
                continue
            if data is not None and len(data) > SECTOR and 0 < keep < 1 and chance.random() < 0.2:
                data = data[: SECTOR * chance.randrange(1, len(data) // SECTOR + 1)]
        file = files.setdefault(operation.path, bytearray())
        if data is None:
            del file[operation.offset :]
            continue
        if len(file) < operation.offset:
            file.extend(bytes(operation.offset - len(file)))
        file[operation.offset : operation.offset + len(data)] = data
    return {path: bytes(data) for path, data in files.items()}


def violations(trace: Trace, scratch: Path, *, seed: int, cuts: int = 40, variants: int = 4) -> list[str]:
    """Cut the power at up to `cuts` moments, in several ways each; give what was said and is not there."""
    chance = random.Random(seed)
    wrong: list[str] = []
    chosen = sorted(
        chance.sample(range(len(trace.cuts)), min(cuts, len(trace.cuts))),
    )
    for at in chosen:
        cut = trace.cuts[at]
        for variant in range(variants):
            keep = (0.0, 1.0)[variant] if variant < 2 else chance.random()
            files = rebuild(trace, cut, chance, keep)
            text = _compare(files, cut, scratch)
            if text:
                wrong.append(f"power cut at send {at}, {keep:.0%} of what was not synchronised done: {text}")
    return wrong


def _compare(files: dict[str, bytes], cut: Cut, scratch: Path) -> str:
    stored: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for path, data in files.items():
            (Path(folder) / Path(path).name).write_bytes(data)
        for file in sorted(Path(folder).glob("*.db")):
            try:
                with contextlib.closing(sqlite3.connect(file)) as database:
                    found = database.execute("PRAGMA integrity_check").fetchall()
                    if found != [("ok",)]:
                        return f"{file.name} is damaged: {found[:3]}"
                    rows = database.execute("SELECT room, value FROM entries WHERE key = 'count'").fetchall()
            except sqlite3.Error as error:
                return f"{file.name} cannot be read: {error}"
            stored.update({room.partition("/")[2]: decode(value) for room, value in rows})
    missing = {room: (stored.get(room, 0), count) for room, count in cut.said.items()}
    missing = {room: pair for room, pair in missing.items() if pair[0] < pair[1]}
    return ", ".join(f"{room} said {count}, {kept} is stored" for room, (kept, count) in missing.items())


def record(folder: Path, durability: str, *, rooms: int = 4, messages: int = 25, padding: int = 0) -> Trace:
    """Run rooms that count, and log what their host does. `padding`: bytes that each turn writes beside."""
    app = folder / "counting.py"
    app.write_text(APP)
    log = folder / "strace.log"
    with Instance(folder, "--durability", durability, app=app) as instance:
        [host] = instance.pids("host")
        options = ("-yy", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-e", "signal=none")
        with traced([host], *options, log=log):
            shards = instance.data / "shards"
            base = {str(each): each.read_bytes() for each in shards.iterdir() if _kept(each)}
            _talk(instance.port, rooms, messages, padding)
    return parse(log.read_text().splitlines(), base, str(shards))


def _kept(path: Path) -> bool:
    return path.name.endswith((".db", ".db-wal"))


def _talk(port: int, rooms: int, messages: int, padding: int) -> None:
    with contextlib.ExitStack() as stack:
        clients: list[RawClient] = []
        for number in range(rooms):
            client = stack.enter_context(RawClient(port))
            client.handshake(f"/party/room{number}")
            clients.append(client)
        for number in _bursts(messages):
            for client in clients:
                client.sock.sendall(encode_frame(TEXT, b"%d" % padding) * number)
            for client in clients:
                for _ in range(number):
                    client.receive()


def _bursts(messages: int) -> Iterator[int]:
    while messages > 0:
        number = min(messages, 1 + messages % 4)
        messages -= number
        yield number


def main(arguments: Sequence[str]) -> int:
    """The command; exit status 1 when `full` loses something, or `os` does not."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos powercut", description=__doc__)
    parser.add_argument("--messages", type=int, default=200, help="messages of each room")
    parser.add_argument("--rooms", type=int, default=4)
    parser.add_argument(
        "--padding", type=int, default=8000, help="bytes beside the count, so that there are checkpoints"
    )
    parser.add_argument("--cuts", type=int, default=400)
    parser.add_argument("--variants", type=int, default=8, help="ways to lose power at each moment")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    clean = True
    for durability, expected in (("full", False), ("os", True)):
        with tempfile.TemporaryDirectory(prefix="broker-powercut-") as name:
            folder = Path(name)
            trace = record(
                folder, durability, rooms=given.rooms, messages=given.messages, padding=given.padding
            )
            wrong = violations(trace, folder, seed=given.seed, cuts=given.cuts, variants=given.variants)
        writes, said = len(trace.operations), len(trace.cuts)
        print(f"{durability}: {writes} writes, {said} sends that acknowledged, {len(wrong)} violations")
        for text in wrong[:3]:
            print(f"    {text}")
        clean = clean and bool(wrong) == expected and said > 0
    print("CLEAN" if clean else "NOT CLEAN")
    return 0 if clean else 1
