"""The keeper: the real process, real TCP sockets, real deaths; and its table against a model."""

import array
import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hibernation import keeper_messages as messages
from hibernation.configuration import KeeperConfig
from hibernation.keeper import DRAIN_MESSAGES, Keeper
from hibernation.keeper_messages import BATCH_MAX, HEADER, LAYOUT, Malformed, Message
from hibernation.keeper_table import WAY_BATCHES_MAX, Progress, Table, Take
from hibernation.keeping import (
    WAY_MESSAGES_MAX,
    KeeperClient,
    KeeperError,
    KeeperGone,
    KeeperRefused,
    Kept,
)
from tests.e2e.broker_process import eventually

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_SECONDS = 20.0
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


class KeeperProcess:
    """The real command on a data directory; a context manager that leaves nothing running."""

    def __init__(self, data: Path) -> None:
        self.data = data
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "hibernation.keeper"],
            stdin=subprocess.PIPE,
            pass_fds=[writing],
            env=ENVIRONMENT,
            start_new_session=True,
        )
        os.close(writing)
        assert self.process.stdin is not None
        self.process.stdin.write(KeeperConfig(data, writing).to_json().encode() + b"\n")
        self.process.stdin.close()
        with os.fdopen(reading) as status:
            self.report = json.loads(status.readline())
            # The pipe ends with the first report, so a status that nobody reads can never block it.
            assert status.readline() == ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def fds(self) -> list[int]:
        return [int(name) for name in os.listdir(f"/proc/{self.pid}/fd")]

    def resident_kib(self) -> int:
        [line] = [row for row in Path(f"/proc/{self.pid}/status").read_text().split("\n") if "VmRSS" in row]
        return int(line.split()[1])

    def limit(self, descriptors: int) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_NOFILE, (descriptors, 20_000))

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It does not run meanwhile: what is sent to it stays in the kernel."""
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: Path(f"/proc/{self.pid}/stat").read_text().split(") ")[1][0] == "T")
        try:
            yield
        finally:
            os.kill(self.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def keeper(tmp_path: Path) -> Iterator[KeeperProcess]:
    with KeeperProcess(tmp_path) as process:
        assert process.report == {"event": "ready"}
        yield process


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as held:
        yield held


@pytest.fixture
def client(keeper: KeeperProcess) -> Iterator[KeeperClient]:
    connected = KeeperClient.connect(keeper.data)
    yield connected
    connected.close()


class Pairs:
    """TCP connections within this process: `ours` is the end of a gateway, `theirs` that of a client."""

    def __init__(self, count: int) -> None:
        self.ours: list[int] = []
        self.theirs: list[socket.socket] = []
        with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
            for _ in range(count):
                self.theirs.append(socket.create_connection(listener.getsockname(), DEADLINE_SECONDS))
                self.ours.append(listener.accept()[0].detach())
        self.cookies = [cookie(fd) for fd in self.ours]

    def close_ours(self) -> None:
        messages.close_all(self.ours)
        self.ours = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_ours()
        for each in self.theirs:
            each.close()


def cookie(fd: int) -> int:
    """The kernel's own number of a socket, the same for all its descriptors (socket(7), SO_COOKIE)."""
    with socket.socket(fileno=os.dup(fd)) as duplicate:
        (number,) = struct.unpack("=Q", duplicate.getsockopt(socket.SOL_SOCKET, 57, 8))
    return int(number)


def settle(client: KeeperClient) -> None:
    """Wait until the keeper has carried out all that the client has said."""
    poll = select.poll()
    poll.register(client.fd, select.POLLIN)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while client.acknowledged < client.sent:
        assert poll.poll(max(0, deadline - time.monotonic()) * 1000), "no acknowledgement"
        client.receive()


def hear(client: KeeperClient) -> None:
    """Wait for the keeper's next word, and take it."""
    assert select.select([client.fd], [], [], DEADLINE_SECONDS)[0]
    client.receive()


@contextlib.contextmanager
def taken(data: Path) -> Iterator[Kept]:
    """Everything that the keeper holds, as another process would take it."""
    client = KeeperClient.connect(data)
    kept = client.take(DEADLINE_SECONDS)
    try:
        yield kept
    finally:
        kept.close()
        client.close()


def what_is_held(data: Path) -> dict[int, int]:
    """The cookies of the kept sockets by slot."""
    with taken(data) as kept:
        return {slot: cookie(fd) for slot, fd in zip(kept.slots, kept.fds, strict=True)}


def in_child(function: Callable[[], None]) -> int:
    """Run it in a forked process and give how that ended; one that returns ends with 0."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def raw(data: Path) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connected.settimeout(DEADLINE_SECONDS)
    connected.connect(os.fspath(data / "keeper.sock"))
    return connected


def next_raw(connected: socket.socket) -> Message | None:
    assert select.select([connected], [], [], DEADLINE_SECONDS)[0]
    return messages.receive_message(connected)


def last_words(connected: socket.socket) -> str:
    """The text of the ERROR with which the keeper ended the session."""
    text = ""
    while (message := next_raw(connected)) is not None:
        messages.close_all(message.fds)
        if message.kind == messages.ERROR:
            text = message.text()
    return text


def slots_body(*slots: int) -> bytes:
    return array.array("i", slots).tobytes()


# --- What is kept -------------------------------------------------------------------------------------


def test_thousands_of_sockets_outlive_the_process_that_put_them(
    keeper: KeeperProcess, client: KeeperClient, stack: contextlib.ExitStack
) -> None:
    pairs = stack.enter_context(Pairs(4_000))
    slots = [3 * index + 1 for index in range(4_000)]
    memory = os.memfd_create("ledger")
    os.write(memory, b"columns")
    client.pin("ledger", memory)
    number = client.put(slots, pairs.ours)
    assert number == client.sent == 1 + 4_000 // BATCH_MAX
    settle(client)
    assert client.flush()
    assert client.held == (1, 4_000)
    client.close()
    pairs.close_ours()
    os.close(memory)

    for _ in range(2):  # it goes on holding what it has given
        with taken(keeper.data) as kept:
            assert list(kept.slots) == slots
            assert [cookie(fd) for fd in kept.fds] == pairs.cookies
            assert os.pread(kept.named["ledger"], 100, 0) == b"columns"
            for fd, theirs in list(zip(kept.fds, pairs.theirs, strict=True))[::97]:
                os.write(fd, b"to the client")
                assert theirs.recv(100) == b"to the client"
                theirs.sendall(b"to the gateway")
                assert os.read(fd, 100) == b"to the gateway"


def test_a_slot_or_name_that_is_given_again_is_replaced(keeper: KeeperProcess, client: KeeperClient) -> None:
    with Pairs(3) as pairs:
        client.put([5], pairs.ours[:1])
        client.put([5, 0], pairs.ours[1:])
        client.pin("a", pairs.ours[0])
        client.pin("a", pairs.ours[2])
        settle(client)
        assert client.held == (1, 2)
        assert what_is_held(keeper.data) == {5: pairs.cookies[1], 0: pairs.cookies[2]}
        with taken(keeper.data) as kept:
            assert cookie(kept.named["a"]) == pairs.cookies[2]
        pairs.close_ours()
        assert pairs.theirs[0].recv(1) == b""  # nothing is left of the first


def test_the_last_duplicate_dropped_is_the_end_for_the_peer(client: KeeperClient) -> None:
    with Pairs(2) as pairs:
        client.put([0, 1], pairs.ours)
        settle(client)
        pairs.close_ours()
        assert select.select(pairs.theirs, [], [], 0)[0] == []
        client.drop([1, 700_000])
        assert pairs.theirs[1].recv(1) == b""
        assert select.select(pairs.theirs[:1], [], [], 0)[0] == []
        settle(client)
        assert client.held == (0, 1)


def test_names_are_taken_one_by_one_or_all(keeper: KeeperProcess, client: KeeperClient) -> None:
    with Pairs(3) as pairs:
        for name, fd in zip(["listener", "log-a", "jöürnal"], pairs.ours, strict=True):
            client.pin(name, fd)
        client.put([1], pairs.ours[:1])
        journal = client.take_named("jöürnal", DEADLINE_SECONDS)
        assert journal is not None
        assert cookie(journal) == pairs.cookies[2]
        os.close(journal)
        assert client.take_named("nobody", DEADLINE_SECONDS) is None
        client.unpin("listener")
        client.unpin("nobody")
        kept = client.take(DEADLINE_SECONDS)
        assert sorted(kept.named) == ["jöürnal", "log-a"]
        assert list(kept.slots) == [1]
        kept.close()
        kept.close()


def test_nothing_grows_over_a_thousand_rounds(keeper: KeeperProcess, client: KeeperClient) -> None:
    slots = list(range(100))
    with Pairs(100) as pairs:

        def rounds(count: int) -> None:
            for _ in range(count):
                client.put(slots, pairs.ours)
                client.drop(slots)
                settle(client)

        rounds(100)
        ours, its, kib = len(os.listdir("/proc/self/fd")), len(keeper.fds()), keeper.resident_kib()
        rounds(1_000)
        assert client.held == (0, 0)
        assert (len(os.listdir("/proc/self/fd")), len(keeper.fds())) == (ours, its)
        assert keeper.resident_kib() <= kib + 256


# --- Deaths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connected_before", [True, False])
def test_what_a_killed_process_had_sent_is_there_for_the_next_take(
    keeper: KeeperProcess, stack: contextlib.ExitStack, connected_before: bool
) -> None:
    """Read by nobody when its sender dies, and asked for at once (K4)."""
    pairs = stack.enter_context(Pairs(WAY_MESSAGES_MAX * BATCH_MAX - 400))
    slots = list(range(len(pairs.ours)))
    clients = [KeeperClient.connect(keeper.data)] if connected_before else []
    for early in clients:
        # An acknowledgement that the dead one never reads makes the kernel say ECONNRESET first.
        early.put([9_999], pairs.ours[:1])
        assert select.select([early.fd], [], [], DEADLINE_SECONDS)[0]

    def put_and_die() -> None:
        putter = clients[0] if clients else KeeperClient.connect(keeper.data)
        putter.put(slots, pairs.ours)
        assert putter.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    results: list[dict[int, int]] = []
    with keeper.stopped():
        assert in_child(put_and_die) == -signal.SIGKILL
        for early in clients:
            early._socket.close()
        pairs.close_ours()
        taker = KeeperClient.connect(keeper.data)

        def take() -> None:
            kept = taker.take(DEADLINE_SECONDS)
            results.append({slot: cookie(fd) for slot, fd in zip(kept.slots, kept.fds, strict=True)})
            kept.close()

        thread = threading.Thread(target=take)
        thread.start()
        eventually(lambda: unread_by_keeper(taker) > 0, "the TAKE stands in the kernel")
    thread.join(DEADLINE_SECONDS)
    taker.close()
    expected = dict(zip(slots, pairs.cookies, strict=True))
    if connected_before:
        expected[9_999] = pairs.cookies[0]
    assert results == [expected]


def put_many_and_die(data: Path, count: int) -> None:
    """One descriptor a message, more than a keeper reads at a time; in a child."""
    with raw(data) as putter:
        putter.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        for slot in range(count):
            fds = array.array("i", [0])
            messages.send_message(putter, Message(messages.PUT, slot + 1, 1, slots_body(slot), fds))
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_had_sent_is_counted_before_a_take_begins(keeper: KeeperProcess) -> None:
    """All of it is in the first answer to the taker (K4)."""
    count = DRAIN_MESSAGES * 3 // 2
    with raw(keeper.data) as taker:
        with keeper.stopped():
            assert in_child(lambda: put_many_and_die(keeper.data, count)) == -signal.SIGKILL
            messages.send_message(taker, Message(messages.TAKE, 1))
        answers = [next_raw(taker), next_raw(taker)]
    [coming] = [answer for answer in answers if answer is not None and answer.kind == messages.COMING]
    assert coming.counts() == (0, count)


def test_what_a_killed_process_had_sent_is_kept_though_nobody_can_be_told(keeper: KeeperProcess) -> None:
    """An acknowledgement fails before the last message has been read."""
    count = DRAIN_MESSAGES * 3 // 2
    before = len(keeper.fds())
    with keeper.stopped():
        assert in_child(lambda: put_many_and_die(keeper.data, count)) == -signal.SIGKILL
    eventually(lambda: len(keeper.fds()) == before + count)


def unread_by_keeper(client: KeeperClient) -> int:
    """Bytes that a client has sent and its keeper has not read (unix(7), SIOCOUTQ)."""
    (unread,) = struct.unpack("i", fcntl.ioctl(client.fd, termios.TIOCOUTQ, bytes(4)))
    return int(unread)


def test_a_taker_killed_in_the_middle_takes_nothing_from_the_next(
    keeper: KeeperProcess, client: KeeperClient, stack: contextlib.ExitStack
) -> None:
    pairs = stack.enter_context(Pairs(2_000))
    client.put(range(2_000), pairs.ours)
    settle(client)
    before = sorted(keeper.fds())

    def take_some_and_die() -> None:
        taker = raw(keeper.data)
        messages.send_message(taker, Message(messages.TAKE, 1))
        batches = 0
        while batches < 3:
            message = next_raw(taker)
            assert message is not None
            if message.kind in (messages.COMING, messages.SLOTS):
                messages.send_message(taker, Message(messages.TOOK, batches))
                batches += 1
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(3):
        assert in_child(take_some_and_die) == -signal.SIGKILL
    assert what_is_held(keeper.data) == dict(enumerate(pairs.cookies))
    eventually(lambda: sorted(keeper.fds()) == before)


def test_the_death_of_the_keeper_is_told_and_another_is_filled(
    keeper: KeeperProcess, client: KeeperClient
) -> None:
    with Pairs(2) as pairs:
        client.put([0], pairs.ours[:1])
        settle(client)
        os.kill(keeper.pid, signal.SIGKILL)
        assert keeper.process.wait() == -signal.SIGKILL
        client.put([1], pairs.ours[1:])
        assert client.flush()  # nothing waits for the dead
        with pytest.raises(KeeperGone, match="another is started, which has to be filled again"):
            hear(client)
        with pytest.raises(KeeperGone, match="session with the keeper is over; connect again"):
            client.receive()
        with pytest.raises(KeeperGone, match="no keeper listens here; `broker serve` starts one"):
            KeeperClient.connect(keeper.data)
        # The dead one's socket file is still there.
        assert (keeper.data / "keeper.sock").exists()
        with KeeperProcess(keeper.data) as second:
            assert second.report == {"event": "ready"}
            again = KeeperClient.connect(keeper.data)
            again.put([0, 1], pairs.ours)
            assert what_is_held(keeper.data) == dict(enumerate(pairs.cookies))
            again.close()


def test_only_the_end_of_the_keeper_ends_what_it_keeps(keeper: KeeperProcess, client: KeeperClient) -> None:
    with Pairs(1) as pairs:
        client.put([0], pairs.ours)
        settle(client)
        pairs.close_ours()
        client.close()
        os.kill(keeper.pid, signal.SIGINT)
        os.kill(keeper.pid, signal.SIGHUP)
        assert what_is_held(keeper.data) == {0: pairs.cookies[0]}
        os.kill(keeper.pid, signal.SIGTERM)
        assert keeper.process.wait() == -signal.SIGTERM
        assert pairs.theirs[0].recv(1) == b""


def test_a_keeper_that_hangs_is_not_waited_for(keeper: KeeperProcess, client: KeeperClient) -> None:
    with keeper.stopped(), Pairs(1) as pairs:
        assert client.put([0], pairs.ours) == 1
        with pytest.raises(KeeperGone, match="does not answer in time; if it hangs end it with SIGKILL"):
            client.take(0.05)
        with pytest.raises(KeeperGone, match="over"):
            client.receive()
    assert what_is_held(keeper.data).keys() == {0}


# --- Limits -------------------------------------------------------------------------------------------

TAKER = """
import os, resource, sys
from hibernation.keeping import KeeperClient, KeeperError
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[2]), int(sys.argv[2])))
client = KeeperClient.connect(sys.argv[1])
before = os.listdir("/proc/self/fd")
try:
    kept = client.take(20)
    print(len(kept.slots))
except KeeperError as error:
    print(type(error).__name__, len(before) - len(os.listdir("/proc/self/fd")), error)
"""


def test_a_taker_with_too_low_a_limit_takes_nothing(keeper: KeeperProcess, client: KeeperClient) -> None:
    def take(limit: int) -> str:
        command = [sys.executable, "-P", "-c", TAKER, str(keeper.data), str(limit)]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True).stdout

    with Pairs(500) as pairs:
        client.put(range(500), pairs.ours)
        settle(client)
        said = take(100)
        assert said.startswith("TooFewDescriptors 1 ")  # its own session is closed, nothing else is open
        assert "limit is 100; nothing was taken: raise the limit (ulimit -n" in said
        assert take(540) == "500\n"
        assert what_is_held(keeper.data) == dict(enumerate(pairs.cookies))


def test_a_keeper_at_its_limit_refuses_and_keeps_what_it_has(
    keeper: KeeperProcess, client: KeeperClient
) -> None:
    with Pairs(600) as pairs:
        client.put(range(300), pairs.ours[:300])
        settle(client)
        # Room for 150 more, beside those that it never uses for keeping.
        keeper.limit(len(keeper.fds()) + 80 + 150)
        number = client.put(range(300, 500), pairs.ours[300:500])
        more = client.put(range(500, 600), pairs.ours[500:])
        with pytest.raises(
            KeeperRefused, match=r"holds 300 descriptors .*: raise the limit \(ulimit -n"
        ) as refusal:
            while True:
                hear(client)
        assert refusal.value.numbers == (number,)
        assert not refusal.value.ended
        settle(client)
        assert client.acknowledged == more  # and the session goes on
        held = [*range(300), *range(500, 600)]
        assert what_is_held(keeper.data) == {slot: pairs.cookies[slot] for slot in held}
        client.pin("listener", pairs.ours[0])
        client.drop(range(200))
        client.put(range(300, 500), pairs.ours[300:500])
        settle(client)
        assert client.held == (1, 400)


def test_a_keeper_without_descriptors_says_so_at_its_door(
    keeper: KeeperProcess, client: KeeperClient
) -> None:
    with Pairs(100) as pairs:
        client.put(range(100), pairs.ours)
        settle(client)
        keeper.limit(20)
        late = KeeperClient.connect(keeper.data)
        with pytest.raises(
            KeeperRefused, match=r"no more sessions, Too many open files: raise the"
        ) as refusal:
            late.take(DEADLINE_SECONDS)
        assert refusal.value.ended
        keeper.limit(20_000)
        assert what_is_held(keeper.data) == dict(enumerate(pairs.cookies))


def test_descriptors_lost_on_their_way_to_the_keeper_are_seen(
    keeper: KeeperProcess, client: KeeperClient
) -> None:
    """MSG_CTRUNC: the kernel drops what the receiver may not open, and tells only the receiver."""
    with Pairs(1) as pairs, raw(keeper.data) as liar:
        client.put([0], pairs.ours)
        settle(client)
        before = sorted(keeper.fds())
        keeper.limit(len(before) + 80 + 10)
        rights = array.array("i", pairs.ours * 150)
        messages.send_message(liar, Message(messages.PUT, 1, 1, slots_body(7), rights))
        assert "MSG_CTRUNC" in last_words(liar)
        eventually(lambda: len(keeper.fds()) == len(before) - 1)
        assert what_is_held(keeper.data) == {0: pairs.cookies[0]}


def test_descriptors_lost_on_their_way_to_a_taker_are_seen() -> None:
    ours, fake = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client = KeeperClient(ours)
    many = array.array("i", [fake.fileno()] * 100)
    for message in (
        Message(messages.COMING, 0, body=messages.COUNTS.pack(0, 1)),
        Message(messages.SLOTS, 1, 100, slots_body(*range(100)), many),
    ):
        messages.send_message(fake, message)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    free = [number for number in range(max(used) + 100) if number not in used]
    try:
        # Enough for the one that was announced.
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(free[40], len(used) + 40), hard))
        with pytest.raises(KeeperError, match=r"MSG_CTRUNC.*the limit of open files"):
            client.take(DEADLINE_SECONDS)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == len(used) - 1  # the client's
    fake.close()


def test_a_take_that_is_not_complete_is_none() -> None:
    """Counts are compared at the end, and what had come is closed."""
    ours, fake = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    before = len(os.listdir("/proc/self/fd"))
    client = KeeperClient(ours)
    one = array.array("i", [fake.fileno()])
    for message in (
        Message(messages.COMING, 0, body=messages.COUNTS.pack(0, 2)),
        Message(messages.SLOTS, 1, 1, slots_body(4), one),
        Message(messages.DONE, 2, body=messages.COUNTS.pack(0, 2)),
    ):
        messages.send_message(fake, message)
    with pytest.raises(
        KeeperError, match=r"\(0, 2\) names and slots were sent, and \(0, 1\) came.*try again"
    ):
        client.take(DEADLINE_SECONDS)
    assert len(os.listdir("/proc/self/fd")) == before - 1
    fake.close()


def test_a_message_takes_200_descriptors_and_not_one_more(
    keeper: KeeperProcess, client: KeeperClient
) -> None:
    client.unpin("nothing")
    settle(client)
    before = sorted(keeper.fds())
    with raw(keeper.data) as greedy, Pairs(1) as pairs:
        with pytest.raises(OSError, match="Invalid argument") as refusal:
            greedy.sendmsg(
                [b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", pairs.ours * 254))]
            )
        assert refusal.value.errno == errno.EINVAL
        body = slots_body(*range(253))
        rights = array.array("i", pairs.ours * 253)
        messages.send_message(greedy, Message(messages.PUT, 1, 253, body, rights))
        assert last_words(greedy) == "253 slots in 1012 bytes, and at most 200 slots"
        eventually(lambda: sorted(keeper.fds()) == before)
        client.put(range(200), pairs.ours * 200)
        settle(client)
        assert client.held == (0, 200)
        assert client.sent == 2


# --- Whom it takes, and what -----------------------------------------------------------------------------


def test_a_second_keeper_is_told_who_is_there(keeper: KeeperProcess, client: KeeperClient) -> None:
    with KeeperProcess(keeper.data) as second:
        assert second.report["event"] == "error"
        assert f"process {keeper.pid} is the keeper here already; use it" in second.report["text"]
        assert second.process.wait() == 1
    with Pairs(1) as pairs:
        client.put([0], pairs.ours)
        settle(client)


def test_a_file_in_the_place_of_the_socket_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("untouched")
    (tmp_path / "keeper.sock").symlink_to(tmp_path / "elsewhere")
    with KeeperProcess(tmp_path) as process:
        assert process.report == {"event": "ready"}
        assert what_is_held(tmp_path) == {}
    assert (tmp_path / "elsewhere").read_text() == "untouched"


def test_a_directory_open_to_others_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o770)
    with KeeperProcess(tmp_path) as process:
        assert process.report["event"] == "error"
        assert "mode 770; chmod 700" in process.report["text"]


def test_a_path_that_is_too_long_is_told_on_both_sides(tmp_path: Path) -> None:
    data = tmp_path / ("x" * 100)
    data.mkdir(0o700)
    with KeeperProcess(data) as process:
        assert process.report["event"] == "error"
        assert "a Unix socket's may have 107; choose a shorter --data" in process.report["text"]
    with pytest.raises(KeeperError, match="choose a shorter --data"):
        KeeperClient.connect(data)


def test_the_socket_is_its_users_alone(keeper: KeeperProcess) -> None:
    assert (keeper.data / "keeper.sock").stat().st_mode & 0o777 == 0o600
    assert (keeper.data / "keeper.lock").stat().st_mode & 0o777 == 0o600


@needs_root
def test_another_user_is_turned_away(keeper: KeeperProcess, client: KeeperClient) -> None:
    def connect(expected: type[KeeperError], words: str) -> None:
        os.chdir(keeper.data)  # those above it are not for others
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            stranger.connect("keeper.sock")
        except PermissionError:
            assert expected is KeeperError
            return
        with pytest.raises(expected, match=words):
            KeeperClient(stranger).take(DEADLINE_SECONDS)

    with Pairs(1) as pairs:
        client.put([0], pairs.ours)
        settle(client)
        assert in_child(lambda: connect(KeeperError, "")) == 0
        # Even with the modes opened by somebody who did not think.
        keeper.data.chmod(0o777)
        (keeper.data / "keeper.sock").chmod(0o666)
        assert in_child(lambda: connect(KeeperRefused, "processes of its own user")) == 0
        assert what_is_held(keeper.data) == {0: pairs.cookies[0]}


@needs_root
def test_an_impostor_is_given_nothing(tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = tmp_path / "keeper.sock"
    listener.bind(os.fspath(path))

    # The kernel notes who calls listen().
    def listen() -> None:
        os.setuid(NOBODY)
        listener.listen()

    assert in_child(listen) == 0
    with pytest.raises(
        KeeperError, match=f"another user \\(uid {NOBODY}\\) listens here, and was given nothing"
    ):
        KeeperClient.connect(tmp_path)
    listener.close()


def test_no_child_inherits_what_was_kept(keeper: KeeperProcess, client: KeeperClient) -> None:
    with Pairs(50) as pairs:
        client.put(range(50), pairs.ours)
        client.pin("listener", pairs.ours[0])
        settle(client)
        with taken(keeper.data) as kept:
            with subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False) as child:
                links = {os.readlink(f"/proc/self/fd/{fd}") for fd in (*kept.fds, kept.named["listener"])}
                # What was there before exec goes away one by one.
                command = Path(f"/proc/{child.pid}/cmdline")
                eventually(lambda: command.read_bytes() == b"cat\0", "the exec")
                theirs = set()
                for each in Path(f"/proc/{child.pid}/fd").iterdir():
                    with contextlib.suppress(FileNotFoundError):  # a library that it has loaded meanwhile
                        theirs.add(os.readlink(each))
                assert len(links) == 50
                assert theirs.isdisjoint(links)
                child.communicate()
            for fd in keeper.fds():
                flags = Path(f"/proc/{keeper.pid}/fdinfo/{fd}").read_text().split("flags:")[1].split()[0]
                assert fd <= 2 or int(flags, 8) & os.O_CLOEXEC, fd


MALFORMED: dict[str, tuple[bytes, int, str]] = {
    # name: (the message, how many descriptors, what the keeper says of it)
    "short": (b"\x01", 0, "a message of 1 bytes"),
    "only descriptors": (b"", 2, "a message of 0 bytes"),
    "long": (HEADER.pack(LAYOUT, messages.DROP, 0, 1) + bytes(5_000), 0, "more than 4096 bytes"),
    "layout": (HEADER.pack(LAYOUT + 1, messages.DROP, 0, 1), 0, "layout 2, where 1 is spoken"),
    "kind": (HEADER.pack(LAYOUT, 99, 0, 1), 0, "kind 99 is unknown"),
    "answer": (HEADER.pack(LAYOUT, messages.DONE, 0, 1), 0, "unknown"),
    "number": (HEADER.pack(LAYOUT, messages.DROP, 0, 2), 0, "message 2 came where 1 was next"),
    "took": (HEADER.pack(LAYOUT, messages.TOOK, 0, 0), 0, "batch 0 was acknowledged, and is not on its way"),
    "fewer": (HEADER.pack(LAYOUT, messages.PUT, 2, 1) + slots_body(3, 4), 1, "1 descriptors came"),
    "more": (HEADER.pack(LAYOUT, messages.PUT, 1, 1) + slots_body(3), 2, "2 descriptors came"),
    "no slots": (HEADER.pack(LAYOUT, messages.PUT, 1, 1), 1, "1 slots in 0 bytes"),
    "negative": (HEADER.pack(LAYOUT, messages.PUT, 1, 1) + slots_body(-1), 1, "a slot outside"),
    "far": (HEADER.pack(LAYOUT, messages.PUT, 1, 1) + slots_body(messages.SLOTS_MAX), 1, "a slot outside"),
    "no name": (HEADER.pack(LAYOUT, messages.PIN, 1, 1), 1, "a name has 1 to 64 bytes"),
    "long name": (HEADER.pack(LAYOUT, messages.PIN, 1, 1) + b"n" * 65, 1, "a name has 1 to 64 bytes"),
    "bad name": (HEADER.pack(LAYOUT, messages.PIN, 1, 1) + b"\xff", 1, "not UTF-8"),
    "zero name": (HEADER.pack(LAYOUT, messages.TAKE, 1, 1) + b"a\0b", 0, "a name has 1 to 64 bytes"),
    "descriptors of a drop": (
        HEADER.pack(LAYOUT, messages.DROP, 1, 1) + slots_body(0),
        3,
        "3 descriptors came",
    ),
    "empty": (b"", 0, ""),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_message_ends_its_session_and_nothing_else(
    keeper: KeeperProcess, client: KeeperClient, case: str
) -> None:
    content, count, words = MALFORMED[case]
    with Pairs(1) as pairs:
        client.put([0], pairs.ours)
        settle(client)
        before = sorted(keeper.fds())
        with raw(keeper.data) as culprit:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", pairs.ours * count))]
            culprit.sendmsg([content], rights if count else [])
            said = last_words(culprit)
            assert words in said
            assert bool(said) is bool(words)
        eventually(lambda: sorted(keeper.fds()) == before)
        client.put([1], pairs.ours)
        settle(client)
        assert client.held == (0, 2)


def test_a_word_in_the_middle_of_a_take_ends_the_session(keeper: KeeperProcess) -> None:
    with raw(keeper.data) as culprit:
        messages.send_message(culprit, Message(messages.TAKE, 1))
        assert (message := next_raw(culprit)) is not None
        messages.send_message(culprit, Message(messages.DROP, 2))
        assert last_words(culprit) == "kind 2 came while a take is under way"
        assert message.kind in (messages.ACK, messages.COMING)


def test_names_and_sessions_are_bounded(
    keeper: KeeperProcess, client: KeeperClient, stack: contextlib.ExitStack
) -> None:
    client.unpin("nothing")
    settle(client)
    without_sessions = len(keeper.fds()) - 1
    with Pairs(1) as pairs:
        for number in range(32):
            client.pin(f"{number:064}", pairs.ours[0])
        client.pin(f"{5:064}", pairs.ours[0])
        settle(client)
        with taken(keeper.data) as kept:
            assert len(kept.named) == 32
        client.pin("one more", pairs.ours[0])
        with pytest.raises(KeeperRefused, match="32 names are held already; unpin one") as refusal:
            while True:
                hear(client)
        assert refusal.value.ended
    without_sessions += 32
    eventually(lambda: len(keeper.fds()) == without_sessions)
    others = [stack.enter_context(raw(keeper.data)) for _ in range(64)]
    late = stack.enter_context(raw(keeper.data))
    assert last_words(late) == "64 sessions are open already; end those not needed"
    others.pop().close()
    eventually(lambda: len(keeper.fds()) == without_sessions + 63)
    assert what_is_held(keeper.data) == {}


def test_a_client_that_does_not_listen_holds_up_nobody(keeper: KeeperProcess, client: KeeperClient) -> None:
    with raw(keeper.data) as deaf, Pairs(1) as pairs:
        connected = KeeperClient(deaf)
        for number in range(1, 1_001):
            messages.send_message(deaf, Message(messages.DROP, number))
            eventually(lambda: unread_by_keeper(connected) == 0)
        client.put([0], pairs.ours)
        settle(client)
        connected.sent = 1_000
        settle(connected)  # what could not be said is said when there is room
        assert connected.acknowledged == 1_000


# --- The client ---------------------------------------------------------------------------------------


def test_what_the_keeper_does_not_read_yet_waits(
    keeper: KeeperProcess, client: KeeperClient, stack: contextlib.ExitStack
) -> None:
    """At most so many descriptors are on their way; `flush` says when none waits."""
    count = (WAY_MESSAGES_MAX + 4) * BATCH_MAX
    pairs = stack.enter_context(Pairs(count))
    with keeper.stopped():
        number = client.put(range(count), pairs.ours)
        assert number == WAY_MESSAGES_MAX + 4
        assert not client.flush()
        assert not client.wants_write  # it waits for an acknowledgement
        waiting = WAY_MESSAGES_MAX * BATCH_MAX
        # Withdrawn, so their descriptors may go.
        client.drop(range(waiting, waiting + 250))
        messages.close_all(pairs.ours[waiting : waiting + 250])
        del pairs.ours[waiting : waiting + 250]
    settle(client)
    assert client.flush()
    expected = {slot: each for slot, each in enumerate(pairs.cookies) if not waiting <= slot < waiting + 250}
    assert what_is_held(keeper.data) == expected


def test_a_full_socket_is_waited_for(keeper: KeeperProcess) -> None:
    connected = raw(keeper.data)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    client = KeeperClient(connected)
    with keeper.stopped():
        for slot in range(12):
            client.drop([slot])
        assert not client.flush()
        wanted = client.wants_write
    assert wanted
    assert select.select([], [client.fd], [], DEADLINE_SECONDS)[1]
    settle(client)
    assert client.acknowledged == 12
    assert not client.wants_write
    client.close()


@needs_root
def test_too_many_descriptors_on_their_way_are_waited_for() -> None:
    """ETOOMANYREFS: the kernel counts those of all processes of a user, against the limit of the sender."""

    def put() -> None:
        os.setuid(NOBODY)
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
        others, unread = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours, fake = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client = KeeperClient(ours)
        for _ in range(2):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * 150))]
            others.sendmsg([b"x"], rights)
        client.put([1], [0])
        assert not client.flush()
        assert not client.wants_write
        with pytest.raises(BlockingIOError):
            messages.receive_message(fake)
        for _ in range(2):
            unread.recv(1)
        # The kernel counts down when it has closed them, which may be a moment later.
        eventually(client.flush)
        message = messages.receive_message(fake)
        assert message is not None
        assert list(message.slots()) == [1]

    assert in_child(put) == 0


def test_a_keeper_that_cannot_send_says_so_and_lives_on(tmp_path: Path) -> None:
    """ETOOMANYREFS on its side: as if its user had too many descriptors on their way."""
    send = messages.send_message

    def send_no_descriptors(to: socket.socket, message: Message) -> None:
        if message.fds:
            raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))
        send(to, message)

    pid = os.fork()
    if pid == 0:
        try:
            messages.send_message = send_no_descriptors
            Keeper(os.fspath(tmp_path)).run()
        finally:
            os._exit(99)
    try:
        eventually((tmp_path / "keeper.sock").exists)
        client = eventually(lambda: connected_or_none(tmp_path))
        assert client is not None
        client.pin("listener", 0)
        settle(client)
        for _ in range(2):
            other = KeeperClient.connect(tmp_path)
            with pytest.raises(KeeperRefused, match=r"could not answer, Too many references.*a little later"):
                other.take(DEADLINE_SECONDS)
        client.unpin("listener")
        settle(client)
        client.close()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def connected_or_none(data: Path) -> KeeperClient | None:
    try:
        return KeeperClient.connect(data)
    except KeeperGone:
        return None  # bound, and not listening yet


def test_a_keeper_that_takes_no_sessions_is_not_waited_for(
    keeper: KeeperProcess, stack: contextlib.ExitStack
) -> None:
    with keeper.stopped():
        with pytest.raises(KeeperGone, match="takes no new sessions, since it hangs; end it with SIGKILL"):
            for _ in range(100):
                stack.callback(KeeperClient.connect(keeper.data).close)


def test_a_descriptor_closed_too_early_is_left_out(keeper: KeeperProcess, client: KeeperClient) -> None:
    with Pairs(2) as pairs:
        gone = os.dup(0)
        os.close(gone)
        with pytest.raises(OSError, match="Bad file descriptor"):
            client.put([0, 1, 2], [pairs.ours[0], gone, pairs.ours[1]])
        with pytest.raises(OSError, match="Bad file descriptor"):
            client.pin("listener", gone)
        assert client.flush()
        settle(client)
        assert client.held == (0, 2)
        assert what_is_held(keeper.data) == {0: pairs.cookies[0], 2: pairs.cookies[1]}


def test_what_makes_no_sense_is_told_at_once(client: KeeperClient) -> None:
    with pytest.raises(ValueError, match="2 slots and 1 descriptors"):
        client.put([1, 2], [0])
    for slot in (-1, messages.SLOTS_MAX):
        with pytest.raises(ValueError, match="slots are 0 to 8388607"):
            client.put([slot], [0])
        with pytest.raises(ValueError, match="slots are 0 to 8388607"):
            client.drop([slot])
    for name in ("", "a\0b", "ö" * 33):
        with pytest.raises(ValueError, match="a name has 1 to 64 bytes"):
            client.pin(name, 0)
    assert client.sent == client.put([], []) == 0


def test_the_keeper_imports_next_to_nothing() -> None:
    code = "import sys, hibernation.keeper; print(*sys.modules)"
    command = [sys.executable, "-P", "-c", code]
    loaded = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout.split()
    ours = {name for name in loaded if name.startswith(("hibernation.", "storage.", "broker"))}
    assert ours == {
        "hibernation.keeper",
        "hibernation.keeper_messages",
        "hibernation.keeper_table",
        "storage.errors",
    }
    assert {"trio", "structlog", "cbor2", "sqlite3", "asyncio", "typing", "dataclasses"}.isdisjoint(loaded)
    assert len((ROOT / "hibernation" / "keeper.py").read_text().splitlines()) < 300


# --- The table against a model ---------------------------------------------------------------------------

slot_lists = st.lists(st.integers(0, 900), max_size=BATCH_MAX, unique=True)
names = st.sampled_from(["listener", "ledger", "log-a"])


class KeepingMachine(RuleBasedStateMachine):
    """Two sessions that put and drop while a third takes, against two dictionaries."""

    def __init__(self) -> None:
        super().__init__()
        self.table = Table()
        self.sessions = [Progress(), Progress()]
        self.taker = Progress()
        self.slots: dict[int, int] = {}
        self.named: dict[str, int] = {}
        self.fds = 0
        self.closed: set[int] = set()
        self.got: list[tuple[int | str, int]] = []
        self.unacknowledged: list[int] = []
        self.throughout: set[tuple[int | str, int]] = set()

    def fresh(self, count: int) -> "array.array[int]":
        self.fds += count
        return array.array("i", range(self.fds - count, self.fds))

    def do(self, session: Progress, kind: int, count: int, body: bytes, fds: "array.array[int]") -> None:
        message = Message(kind, session.received + 1, count, body, fds)
        for fd in self.table.carry_out(session, message):
            assert fd not in self.closed
            self.closed.add(fd)
        self.throughout &= {*self.slots.items(), *self.named.items()}

    @rule(which=st.integers(0, 1), slots=slot_lists)
    def put(self, which: int, slots: list[int]) -> None:
        fds = self.fresh(len(slots))
        self.slots.update(zip(slots, fds, strict=True))
        self.do(self.sessions[which], messages.PUT, len(slots), slots_body(*slots), fds)

    @rule(which=st.integers(0, 1), slots=slot_lists)
    def drop(self, which: int, slots: list[int]) -> None:
        for slot in slots:
            self.slots.pop(slot, None)
        self.do(self.sessions[which], messages.DROP, len(slots), slots_body(*slots), array.array("i"))

    @rule(name=names)
    def pin(self, name: str) -> None:
        [fd] = fds = self.fresh(1)
        self.named[name] = fd
        self.do(self.sessions[0], messages.PIN, 0, name.encode(), fds)

    @rule(name=names)
    def unpin(self, name: str) -> None:
        self.named.pop(name, None)
        self.do(self.sessions[0], messages.UNPIN, 0, name.encode(), array.array("i"))

    @rule(slots=slot_lists)
    def put_with_too_few(self, slots: list[int]) -> None:
        """Refused whole (K2): the invariant below would see any part of it."""
        message = Message(messages.PUT, self.sessions[0].received + 1, len(slots) + 1, slots_body(*slots, 1))
        with pytest.raises(Malformed):
            self.table.carry_out(self.sessions[0], message)

    @precondition(lambda self: self.taker.take is None)
    @rule()
    def take(self) -> None:
        self.do(self.taker, messages.TAKE, 0, b"", array.array("i"))
        self.got = []
        self.unacknowledged = []
        self.throughout = {*self.slots.items(), *self.named.items()}

    @precondition(lambda self: self.taker.take is not None)
    @rule()
    def send(self) -> None:
        take = self.taker.take
        assert take is not None
        message = self.table.offer(take)
        if message is None:
            assert self.unacknowledged
            return
        take.advance(message)
        held: dict[int | str, int] = dict([*self.slots.items(), *self.named.items()])
        if message.kind == messages.DONE:
            assert not self.unacknowledged  # K5
            keys = [key for key, _ in self.got]
            assert len(keys) == len(set(keys))
            assert self.throughout <= set(self.got)
            assert message.counts() == (
                sum(isinstance(key, str) for key in keys),
                sum(isinstance(key, int) for key in keys),
            )
            self.taker.take = None
            return
        if message.kind != messages.COMING:
            assert message.number > 0
            keys = [*(message.names() if message.kind == messages.NAMED else message.slots())]
            for key, fd in zip(keys, message.fds, strict=True):
                assert held[key] == fd  # never one that has been closed
                self.got.append((key, fd))
        self.unacknowledged.append(message.number)
        assert len(self.unacknowledged) <= WAY_BATCHES_MAX

    @precondition(lambda self: self.unacknowledged)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.unacknowledged))
        self.table.carry_out(self.taker, Message(messages.TOOK, number))
        self.unacknowledged = [each for each in self.unacknowledged if each > number]

    @rule()
    def the_taker_dies(self) -> None:
        self.taker = Progress()
        self.unacknowledged = []

    @invariant()
    def the_table_is_the_model(self) -> None:
        take = Take(list(self.table.named), 0)
        held: dict[int | str, int] = {}
        while (message := self.table.offer(take)) is not None and message.kind != messages.DONE:
            take.advance(message)
            take.taken = take.sent
            if message.kind == messages.SLOTS:
                held.update(zip(message.slots(), message.fds, strict=True))
        assert held == self.slots
        assert self.table.named == self.named
        assert (len(self.table), self.table.slot_count) == (len(held) + len(self.named), len(held))
        # Each descriptor that ever came is held, or has been given to be closed: once, by `do`.
        assert {*self.slots.values(), *self.named.values()} == set(range(self.fds)) - self.closed


TestTable = KeepingMachine.TestCase
TestTable.settings = settings(max_examples=60, stateful_step_count=40)
