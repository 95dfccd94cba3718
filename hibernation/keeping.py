"""The side of the keeper's clients: `KeeperClient` puts descriptors into its keeping, and takes them back.

Owns one session with the keeper, from the connection to its end. Never decides what is kept: gateways put
their clients' sockets there, and a successor takes them; a supervisor pins the listener. Must not touch the
data directory but for the socket in it. Its peer is `hibernation.keeper`, in the words of
`hibernation.keeper_messages`.
"""

import contextlib
import errno
import os
import resource
import select
import socket
import time
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import compress

from hibernation.keeper_messages import (
    ACK,
    BATCH_MAX,
    COMING,
    DONE,
    DROP,
    ERROR,
    NAME_BYTES_MAX,
    NAMED,
    PIN,
    PUT,
    REFUSED,
    SLOTS,
    SLOTS_MAX,
    TAKE,
    TOOK,
    UNPIN,
    KeeperError,
    Malformed,
    Message,
    close_all,
    keeper_path,
    peer_of,
    receive_message,
    send_message,
)

__all__ = ["Kept", "KeeperClient", "KeeperError", "KeeperGone", "KeeperRefused", "TooFewDescriptors"]

WAY_MESSAGES_MAX = 16
"""Messages on their way from a client, so that few descriptors are in flight (ETOOMANYREFS, unix(7))."""

TAKER_SPARE = 16
"""Descriptors that a taker must have left over after a take."""


class KeeperGone(KeeperError):
    """There is no keeper to speak to: none has been started, it has died, or it does not answer."""


class KeeperRefused(KeeperError):
    """The keeper did not carry something out; what it held before it still holds.

    `numbers` are the messages that were refused, as `put` and `pin` gave them. `ended` says whether the
    session is over as well; otherwise all other messages are carried out, and `acknowledged` is right about
    them.
    """

    def __init__(self, text: str, numbers: tuple[int, ...] = (), *, ended: bool = False) -> None:
        super().__init__(text)
        self.numbers = numbers
        self.ended = ended


class TooFewDescriptors(KeeperError):
    """This process may not open as many descriptors as the keeper holds; none has been moved.

    `needed` and `limit` are numbers of descriptors, those that are open already included.
    """

    def __init__(self, needed: int, limit: int) -> None:
        super().__init__(
            f"taking what the keeper holds needs {needed:,} descriptors in this process, and its limit is "
            f"{limit:,}; nothing was taken: raise the limit (ulimit -n, or LimitNOFILE= of the service)"
        )
        self.needed = needed
        self.limit = limit


class Kept:
    """What a take brought: descriptors that now belong to this process, closing on exec.

    `named` are those with a name; `fds[i]` is the socket of slot `slots[i]`, in ascending order of slots.
    """

    __slots__ = ("fds", "named", "slots")

    def __init__(self) -> None:
        self.named: dict[str, int] = {}
        self.slots: array[int] = array("i")
        self.fds: array[int] = array("i")

    def close(self) -> None:
        """Close all of them. Idempotent."""
        close_all(self.named.values())
        close_all(self.fds)
        self.named.clear()
        del self.slots[:], self.fds[:]


class KeeperClient:
    """One session with the keeper; made by `connect`. For one thread.

    `put`, `drop`, `pin`, `unpin` never wait: what the kernel does not take at once is sent by `flush`, which
    `receive` calls too. None of them raises when the keeper has died: `fd` becomes readable and `receive`
    tells. The keeper drops nothing when a session ends, however it ends.
    """

    def __init__(self, connected: socket.socket) -> None:
        """Takes over a connected SOCK_SEQPACKET socket."""
        connected.setblocking(False)
        self._socket = connected
        self._waiting: deque[Message] = deque()
        self._on_the_way = 0
        """Number of the last message that the kernel has taken."""
        self._blocked = self._crowded = self._broken = False
        self._last_words = ""
        self.sent = 0
        """Number of the last message, whether the kernel has taken it or not."""
        self.acknowledged = 0
        """Messages up to this number are carried out, but for those that a `KeeperRefused` named."""
        self.held = (0, 0)
        """Named descriptors and slots that the keeper holds, as of its last acknowledgement."""

    @classmethod
    def connect(cls, data: str | os.PathLike[str]) -> "KeeperClient":
        """Connect to the keeper of the data directory.

        Raises `KeeperGone` when none listens there, `KeeperError` when it may not be spoken to.
        """
        path = keeper_path(data)
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connected.setblocking(False)
            connected.connect(path)
            _, uid = peer_of(connected)
        except BlockingIOError:
            connected.close()
            raise KeeperGone(
                f"{path}: the keeper takes no new sessions, since it hangs; end it with SIGKILL, and another "
                "is started and filled again"
            ) from None
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            connected.close()
            raise KeeperGone(f"{path}: no keeper listens here; `broker serve` starts one") from None
        except OSError as error:
            connected.close()
            raise KeeperError(
                f"{path}: {error.strerror}; the keeper takes only processes of its own user: run this one as "
                "that user"
            ) from error
        if uid not in (0, os.geteuid()):
            connected.close()
            raise KeeperError(
                f"{path}: another user (uid {uid}) listens here, and was given nothing; remove this file, or "
                "choose another --data"
            )
        return cls(connected)

    @property
    def fd(self) -> int:
        """The descriptor to watch: readable, call `receive`; writable while `wants_write`, call `flush`."""
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether `flush` waits for `fd` to be writable; it may wait for an acknowledgement instead, which
        `receive` takes.
        """
        return bool(self._waiting) and self._blocked

    def put(self, slots: Sequence[int], fds: Sequence[int]) -> int:
        """Have the keeper hold duplicates of `fds` under `slots`, in the place of what it held under these.

        The descriptors must stay open until `flush` is True, or `drop` of their slot has returned. Gives the
        number of the last message that this took: once `acknowledged` is as high, all of them are held.
        """
        if len(slots) != len(fds):
            raise ValueError(f"{len(slots)} slots and {len(fds)} descriptors")
        given = _slots(slots)
        for start in range(0, len(given), BATCH_MAX):
            end = start + BATCH_MAX
            self._add(PUT, given[start:end].tobytes(), len(given[start:end]), array("i", fds[start:end]))
        self.flush()
        return self.sent

    def drop(self, slots: Sequence[int]) -> int:
        """Have the keeper close what it holds under `slots`; those under which it holds nothing are no error.

        What `put` was given for them and is not sent yet is withdrawn. Gives the message's number.
        """
        given = _slots(slots)
        if self._waiting:
            unwanted = set(given)
            for message in self._waiting:
                if message.kind == PUT:
                    _keep_only(message, [slot not in unwanted for slot in message.slots()])
        for start in range(0, len(given), BATCH_MAX):
            part = given[start : start + BATCH_MAX]
            self._add(DROP, part.tobytes(), len(part))
        self.flush()
        return self.sent

    def pin(self, name: str, fd: int) -> int:
        """Have the keeper hold a duplicate of `fd` under a name; as `put` otherwise."""
        self._add(PIN, _name(name), fds=array("i", [fd]))
        self.flush()
        return self.sent

    def unpin(self, name: str) -> int:
        """Have the keeper close what it holds under a name; nothing there is no error."""
        self._add(UNPIN, _name(name))
        self.flush()
        return self.sent

    def _add(self, kind: int, body: bytes, count: int = 0, fds: "array[int] | None" = None) -> None:
        self.sent += 1
        if not self._broken:
            self._waiting.append(Message(kind, self.sent, count, body, fds))

    def flush(self) -> bool:
        """Send what waits, as far as the kernel and the keeper let; True when nothing waits any more.

        What waits for a keeper that has died is given up: a new one is told everything anew. While this is
        False call it again at times, even without an event: another process of the same user may have had too
        many descriptors in flight.

        Raises OSError (EBADF) when a descriptor was closed too early; it is left out, all others go on.
        """
        while self._waiting and self._on_the_way - self.acknowledged < WAY_MESSAGES_MAX:
            message = self._waiting[0]
            try:
                send_message(self._socket, message)
            except BlockingIOError:
                self._blocked = True
                return False
            except OSError as error:
                if error.errno == errno.ETOOMANYREFS:
                    self._crowded = True
                    return False
                if error.errno != errno.EBADF or self._socket.fileno() < 0:
                    self._give_up()
                    with contextlib.suppress(OSError):
                        self._socket.shutdown(socket.SHUT_RDWR)  # so that `receive` says that it is over
                    return True
                _leave_out_closed(message)
                raise
            self._on_the_way = message.number
            self._waiting.popleft()
            self._blocked = self._crowded = False
        return not self._waiting

    def _give_up(self) -> None:
        self._broken = True
        self._waiting.clear()
        self._blocked = self._crowded = False

    def receive(self) -> None:
        """Take what the keeper has said, to the last message: `acknowledged` is up to date. Never waits.

        Raises `KeeperGone` when the keeper has ended, `KeeperRefused` with its words when it did not carry
        something out.
        """
        refused: list[tuple[int, str]] = []
        while (message := self._next()) is not None:
            if not self._heard(message, refused):
                self._end(message, f"the keeper sent a message of kind {message.kind} that nobody asked for")
        self.flush()
        _raise_refused(refused)

    def _next(self) -> Message | None:
        """Give the next message that is there, None when there is none; raises when the session is over."""
        if self._socket.fileno() < 0:
            raise KeeperGone("this session with the keeper is over; connect again")
        try:
            message = receive_message(self._socket)
        except BlockingIOError:
            return None
        except Malformed as error:
            self.close()
            raise KeeperGone(f"the keeper cannot be understood: {error}") from None
        except OSError as error:
            self.close()
            raise KeeperGone(f"the session with the keeper broke off: {error}; connect again") from error
        if message is None:
            self.close()
            if self._last_words:
                raise KeeperRefused(f"the keeper ended the session: {self._last_words}", ended=True)
            raise KeeperGone("the keeper has ended; another is started, which has to be filled again")
        return message

    def _heard(self, message: Message, refused: list[tuple[int, str]]) -> bool:
        """Take a message that may come at any time; False when it is another."""
        try:
            if message.fds or message.kind not in (ACK, REFUSED, ERROR):
                return False
            if message.kind == ACK:
                self.held = message.counts()
                self.acknowledged = message.number
            elif message.kind == REFUSED:
                refused.append((message.number, message.text()))
            else:
                self._last_words = message.text()
        except Malformed as error:
            self._end(message, f"the keeper cannot be understood: {error}")
        return True

    def _end(self, message: Message, text: str) -> None:
        close_all(message.fds)
        self.close()
        raise KeeperGone(text)

    def take(self, timeout_seconds: float) -> Kept:
        """Take duplicates of everything that the keeper holds; it goes on holding it. Blocks.

        What other sessions had sent before, those of dead processes too, has been carried out first. After
        any failure nothing received is left open, and the session is closed.

        Raises `TooFewDescriptors` before anything is moved; `KeeperGone`, also after `timeout_seconds`;
        `KeeperRefused`; KeeperError when not all arrived.
        """
        return self._take(b"", timeout_seconds)

    def take_named(self, name: str, timeout_seconds: float) -> int | None:
        """Take a duplicate of one named descriptor, None when there is none of this name. As `take`."""
        return self._take(_name(name), timeout_seconds).named.get(name)

    def _take(self, name: bytes, timeout_seconds: float) -> Kept:
        owned: array[int] = array("i")
        try:
            self._add(TAKE, name)
            return self._transfer(owned, time.monotonic() + timeout_seconds)
        except BaseException as error:
            close_all(owned)
            self.close()
            if isinstance(error, Malformed):
                text = (
                    f"the take failed: {error}; the keeper still holds everything, so connect and try again"
                )
                raise KeeperError(text) from None
            raise

    def _transfer(self, owned: "array[int]", deadline: float) -> Kept:
        """Carry the TAKE through; every descriptor that arrives is in `owned` at once."""
        kept = Kept()
        batches = 0
        refused: list[tuple[int, str]] = []
        while True:
            message = self._await_next(deadline)
            if self._heard(message, refused):
                _raise_refused(refused)
                continue
            owned.extend(message.fds)
            arrived = len(message.fds) == message.count
            if message.kind == DONE:
                came = (len(kept.named), len(kept.slots))
                if message.counts() != came:
                    raise Malformed(f"{message.counts()} names and slots were sent, and {came} came")
                return kept
            if message.number != batches:
                raise Malformed(f"batch {message.number} came where {batches} was next")
            if message.kind == COMING and batches == 0:
                require_descriptors(sum(message.counts()))
            elif message.kind == NAMED and batches and arrived:
                kept.named.update(zip(message.names(), message.fds, strict=True))
            elif message.kind == SLOTS and batches and arrived:
                kept.slots.extend(message.slots())
                kept.fds.extend(message.fds)
            else:
                raise Malformed(
                    f"{len(message.fds)} descriptors came with a message of kind {message.kind} and count "
                    f"{message.count}"
                )
            self._tell_taken(batches, deadline)
            batches += 1

    def _await_next(self, deadline: float) -> Message:
        while True:
            self.flush()
            message = self._next()
            if message is not None:
                return message
            self._wait(deadline, select.POLLIN | (select.POLLOUT if self.wants_write else 0))

    def _tell_taken(self, batch: int, deadline: float) -> None:
        while True:
            try:
                send_message(self._socket, Message(TOOK, batch))
                return
            except BlockingIOError:
                self._wait(deadline, select.POLLOUT)
            except (BrokenPipeError, ConnectionResetError):
                return  # what it said last is still to be read

    def _wait(self, deadline: float, events: int) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise KeeperGone(
                "the keeper does not answer in time; if it hangs end it with SIGKILL, and another is started"
            )
        poll = select.poll()
        poll.register(self._socket, events)
        # Too many descriptors in flight: nothing tells when there are fewer.
        poll.poll(10 if self._crowded else left * 1000)

    def close(self) -> None:
        """End the session; what has not been sent is given up, what the keeper holds stays. Idempotent."""
        self._give_up()
        self._socket.close()


def require_descriptors(count: int) -> None:
    """Raise `TooFewDescriptors` unless this process may open `count` more, and a few beside them."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        is_open = len(os.listdir("/proc/self/fd"))
    except OSError:
        is_open = limit  # not even the one to look with
    needed = is_open + count + TAKER_SPARE
    if needed > limit:
        raise TooFewDescriptors(needed, limit)


def _raise_refused(refused: list[tuple[int, str]]) -> None:
    if refused:
        numbers = tuple(number for number, _ in refused)
        raise KeeperRefused(refused[0][1], numbers)


def _name(name: str) -> bytes:
    encoded = name.encode()
    if not encoded or b"\0" in encoded or len(encoded) > NAME_BYTES_MAX:
        raise ValueError(f"a name has 1 to {NAME_BYTES_MAX} bytes, none of them zero; not {name!r}")
    return encoded


def _slots(slots: Sequence[int]) -> "array[int]":
    given = array("i", slots)
    if given and not 0 <= min(given) <= max(given) < SLOTS_MAX:
        raise ValueError(f"slots are 0 to {SLOTS_MAX - 1}")
    return given


def _keep_only(message: Message, wanted: list[bool]) -> None:
    """Leave some of its slots and their descriptors out of a PUT; none left is fine."""
    slots = array("i", compress(message.slots(), wanted))
    message.fds = array("i", compress(message.fds, wanted))
    message.count = len(slots)
    message.body = slots.tobytes()


def _leave_out_closed(message: Message) -> None:
    is_open = [os.path.lexists(f"/proc/self/fd/{fd}") for fd in message.fds]
    if message.kind == PUT:
        _keep_only(message, is_open)
    else:
        # A PIN without its descriptor is nothing, but its number must come.
        message.kind, message.body, message.fds = DROP, b"", array("i")
