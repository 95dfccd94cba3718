"""The keeper: a process that holds duplicates of descriptors, so that clients outlive their gateway.

    python -P -m hibernation.keeper      its configuration (`KeeperConfig`) is one line on standard input

Owns `keeper.sock` and `keeper.lock` in the data directory, and a descriptor for each slot and name that it
was given. It never reads from what it holds, runs nobody's code, opens no database and writes nothing down.
It must stay small: the standard library only, and little of that. Its peers are the `KeeperClient`s of
gateways and of the supervisor, several at once.

Invariants:

    K1  What is held ends by a DROP, an UNPIN, a PUT or PIN of the same slot or name, or the keeper's own end.
        The end of a session, in whatever state, ends nothing.
    K2  A PUT or PIN is carried out whole, or refused whole with nothing left open.
    K3  A message is acknowledged after it has been carried out, or after its refusal has been sent.
    K4  Before a TAKE sends its first descriptor, all that other sessions had sent before it is carried out.
    K5  A taker has not acknowledged more than a few batches at a time, and DONE comes after the last of them.
"""

import fcntl
import json
import os
import resource
import select
import signal
import socket
import sys

from hibernation import keeper_messages as messages
from hibernation.keeper_messages import KeeperError, Malformed, Message
from hibernation.keeper_table import Progress, Table

__all__ = ["Keeper", "main"]

DRAIN_MESSAGES = 64
"""Messages read from one session before others have their turn."""

BUFFERED_MESSAGES_MAX = 4096
"""More than the kernel buffers for one session, so that one drain up to here reads all that had been sent."""

SESSIONS_MAX = 64

RESERVED = SESSIONS_MAX + 16
"""Descriptors that are never used for keeping, so that a taker always finds an open door."""


class Session:
    """One connected client."""

    __slots__ = ("acknowledged", "blocked", "mute", "open", "progress", "socket")

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected
        self.progress = Progress()
        self.acknowledged = 0
        self.open = True
        self.mute = False
        """It has died, and may have left something to read."""
        self.blocked = False
        """It does not read what it is told."""


class Keeper:
    """The socket, the sessions, and the loop. Raises KeeperError when it may not or cannot be one."""

    def __init__(self, data: str) -> None:
        path = messages.keeper_path(data)
        status = os.stat(data)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o077:
            raise KeeperError(
                f"{data}: a keeper's directory must be its user's alone; this has uid {status.st_uid}, mode "
                f"{status.st_mode & 0o777:o}; chmod 700, or choose another --data"
            )
        self._lock = _lock(os.path.join(data, "keeper.lock"))
        # Whoever left it is dead: the lock is ours.
        if os.path.lexists(path):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(SESSIONS_MAX)
        self._listener.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._listener, select.EPOLLIN)
        self._sessions: dict[int, Session] = {}
        self._table = Table()
        self._spare = os.dup(self._epoll.fileno())
        self._own = len(os.listdir("/proc/self/fd"))

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for fd, _ in self._epoll.poll():
                if fd == self._listener.fileno():
                    self._accept()
                elif (session := self._sessions.get(fd)) is not None:
                    self._drain(session, DRAIN_MESSAGES)
                    take = session.progress.take
                    if take is not None and take.sent == 0:
                        self._gather()
                    self._answer(session)

    def _accept(self) -> None:
        while True:
            try:
                connected, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Somebody has lowered the limit. Left in the queue, it would wake us for ever; and accept(2)
                # fails so before it looks whether there is anybody.
                messages.close_all([self._spare])
                self._spare = -1
                try:
                    try:
                        _turn_away(
                            self._listener.accept()[0], f"no more sessions, {error.strerror}: {_RAISE}"
                        )
                    finally:
                        self._spare = os.dup(self._epoll.fileno())
                except OSError:
                    return
                continue
            _, uid = messages.peer_of(connected)
            if uid not in (0, os.geteuid()):
                _turn_away(connected, f"a keeper takes processes of its own user, and this has uid {uid}")
            elif len(self._sessions) >= SESSIONS_MAX:
                _turn_away(connected, f"{SESSIONS_MAX} sessions are open already; end those not needed")
            else:
                self._sessions[connected.fileno()] = Session(connected)
                self._epoll.register(connected, select.EPOLLIN)

    def _gather(self) -> None:
        """Carry out all that has been sent so far, by whomever, dead or alive (K4)."""
        self._accept()
        sessions = list(self._sessions.values())
        for session in sessions:
            self._drain(session, BUFFERED_MESSAGES_MAX)
        for session in sessions:
            self._answer(session)

    def _drain(self, session: Session, limit: int) -> None:
        """Carry out what a session has sent: until there is no more, or a TAKE, or `limit` messages."""
        try:
            for _ in range(limit):
                if not session.open or self._receive(session):
                    return
        except BlockingIOError:
            pass
        except (Malformed, OSError) as error:
            self._end(session, str(error))

    def _receive(self, session: Session) -> bool:
        """Carry out one message; True when the session is to be read no further for now."""
        if self._refuse_what_does_not_fit(session):
            return False
        message = messages.receive_message(session.socket)
        if message is None:
            self._end(session)
            return True
        try:
            unheld = self._table.carry_out(session.progress, message)
        except Malformed:
            messages.close_all(message.fds)
            raise
        messages.close_all(unheld)
        return message.kind == messages.TAKE

    def _refuse_what_does_not_fit(self, session: Session) -> bool:
        """Take away the next message, and refuse it, if its descriptors are too many for our limit (K2)."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        left = limit - self._own - len(self._sessions) - len(self._table) - RESERVED
        if left >= messages.BATCH_MAX:
            return False
        try:
            head = session.socket.recv(messages.HEADER.size, _PEEK)
        except ConnectionResetError:
            head = session.socket.recv(messages.HEADER.size, _PEEK)  # as in `receive_message`
        if len(head) < messages.HEADER.size:
            return False
        layout, kind, count, number = messages.HEADER.unpack(head)
        count = {messages.PUT: count, messages.PIN: 1}.get(kind, 0)
        if layout != messages.LAYOUT or count <= max(left, 0):
            return False
        session.socket.recv(
            messages.HEADER.size, socket.MSG_DONTWAIT
        )  # the kernel closes what nobody fetches
        session.progress.count(number)
        text = (
            f"the keeper holds {len(self._table):,} descriptors at a limit of {limit:,} open files: {_RAISE}"
        )
        if not self._say(session, Message(messages.REFUSED, number, body=text.encode())):
            self._end(session)  # it reads nothing, so it could not learn of the refusal
        return True

    def _answer(self, session: Session) -> None:
        """Acknowledge what has been carried out (K3), and send what a take may send now (K5)."""
        done = not session.open or self._send_what_may_go(session)
        if done is session.blocked and session.open:
            session.blocked = not done
            self._epoll.modify(session.socket, select.EPOLLIN | (0 if done else select.EPOLLOUT))

    def _send_what_may_go(self, session: Session) -> bool:
        progress = session.progress
        if session.acknowledged < progress.received:
            if not self._say(session, Message(messages.ACK, progress.received, body=self._table.counts())):
                return False
            session.acknowledged = progress.received
        while (take := progress.take) is not None and (message := self._table.offer(take)) is not None:
            if not self._say(session, message):
                return False
            take.advance(message)
            if message.kind == messages.DONE or not session.open:
                progress.take = None
        return True

    def _say(self, session: Session, message: Message) -> bool:
        """Send a message to a client; False when it has to wait. One that has died needs none."""
        if session.mute:
            return True
        try:
            messages.send_message(session.socket, message)
        except BlockingIOError:
            return False
        except (BrokenPipeError, ConnectionResetError):
            session.mute = True
        except OSError as error:  # ETOOMANYREFS: this user has too many descriptors on their way
            self._end(
                session, f"the keeper could not answer, {error.strerror}: connect again, a little later"
            )
        return True

    def _end(self, session: Session, text: str = "") -> None:
        """End a session, and nothing else (K1)."""
        session.open, session.mute = False, True
        del self._sessions[session.socket.fileno()]
        self._epoll.unregister(session.socket)
        _turn_away(session.socket, text)


_PEEK = socket.MSG_PEEK | socket.MSG_DONTWAIT

_RAISE = "raise the limit (ulimit -n, or LimitNOFILE= of the service) and start the instance again"


def _turn_away(connected: socket.socket, text: str) -> None:
    """Close a connection, after a last word if there is one."""
    if text:
        try:
            messages.send_message(connected, Message(messages.ERROR, 0, body=text.encode()))
        except OSError:
            pass
    connected.close()


def _lock(path: str) -> int:
    """Take the lock that makes this the only keeper here; raises KeeperError that says whose it is."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        raise KeeperError(
            f"{path}: process {holder or 'unknown'} is the keeper here already; use it"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def main() -> int:
    """Keep until SIGTERM, whose default action ends us; give an exit status when that cannot begin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C and a lost terminal are the supervisor's business
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.umask(0o077)
    config = json.loads(sys.stdin.readline())
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        keeper = Keeper(config["data"])
    except (KeeperError, OSError) as error:
        _report(config["status_fd"], event="error", text=str(error))
        return 1
    _report(config["status_fd"], event="ready")
    keeper.run()
    return 0


def _report(status_fd: int, **fields: str) -> None:
    """As `hibernation.configuration.report`, which is heavy; and close the pipe, since this was all."""
    try:
        os.write(status_fd, json.dumps(fields).encode() + b"\n")
        os.close(status_fd)
    except OSError:
        return


if __name__ == "__main__":
    sys.exit(main())
