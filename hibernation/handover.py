"""One gateway takes another's place, while every socket stays open (S33).

Owns the order of the steps, and what is done when one of them fails:

    old serves ──freeze──▶ old is frozen ──"go" to the successor──▶ successor is ready ──leave──▶ old exits
         │                      │                                        (the new one serves)
         ▼ late, refused        ▼ the successor exits, says an error, or is late
    resume: old serves     successor killed, its exit awaited; resume: old serves

At no time do both serve: a successor touches nothing before "go", "go" is said only to a frozen gateway's
successor, and a frozen gateway is resumed only after the successor's exit. Beneath this lies the registry's
lock, which one process can hold. When the old one dies on the way there is nobody to go back to: the
successor goes on as after a crash, from what the keeper has. Everything here is bounded in time, cancelled
or not. Peers: `hibernation.gateways`, which calls it; `broker.gateway.admin`, which carries the orders out.
"""

from collections.abc import Awaitable, Callable
from time import monotonic

import trio

from hibernation.child import Child, Running
from hibernation.configuration import GO_FROM_REST_LINE, GO_LINE
from hibernation.gateway_line import Line, LineError
from hibernation.logs import get_logger
from hibernation.plan import KILL_SECONDS, Timing

__all__ = ["Handover", "HandoverError"]

log = get_logger("supervisor")

EXIT_SHOWS_SECONDS = 1.0
"""Between the end of a line and the news that the process at its other end has exited."""

RETRY_SECONDS = 0.05


class HandoverError(Exception):
    """The successor was given up; the text says why, and who serves now."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Handover:
    """One attempt, from a successor that waits to one that serves, or to its death."""

    def __init__(
        self,
        old: Running,
        successor: Child,
        connect: Callable[[], Awaitable[Line]],
        timing: Timing,
        *,
        takes_over: Callable[[], None],
        hurry: Callable[[trio.CancelScope], None],
    ) -> None:
        """`connect` opens a line to the gateway that serves; `takes_over` is called before "go" is said.
        `hurry` is given the scope that shields what has to be put right, to cancel it in a hurry.
        """
        self._old = old
        self._successor = successor
        self._connect = connect
        self._timing = timing
        self._takes_over = takes_over
        self._hurry = hurry
        self._line: Line | None = None
        self._asked = False
        self._rests = False

    async def run(self) -> float:
        """Replace the old gateway; gives the seconds for which no socket was read.

        Raises HandoverError; then, and when cancelled, the successor has exited, and the old one serves, or
        has exited.
        """
        paused_at = monotonic()
        failure: HandoverError | None = None
        done = False
        try:
            paused_at = await self._freeze()
            await self._succeed()
            done = True
        except HandoverError as error:
            failure = error
        finally:
            if not done:
                with trio.move_on_after(self._rollback_seconds, shield=True) as scope:
                    self._hurry(scope)
                    await self._roll_back()
                    await self.close()
        if failure is not None:
            outcome = "the old one goes on"
            if self._old.exited.is_set():
                outcome = "the old one has ended too, another is started"
            raise HandoverError(f"{failure.text}; {outcome}") from failure
        return monotonic() - paused_at

    @property
    def _rollback_seconds(self) -> float:
        """The sum of what its steps may take, and a little: a bound that is never met."""
        return 2 * self._timing.resume_seconds + 2 * KILL_SECONDS

    async def _freeze(self) -> float:
        """Returns when the old gateway stopped reading."""
        old, timing = self._old, self._timing
        failure: LineError | None = None
        try:
            self._line = await self._connect()
            if self._line.pid != old.pid:
                raise HandoverError(
                    f"process {self._line.pid} answers in the place of the gateway (process {old.pid})"
                )
            self._asked = True
            log.info("gateway freezes", pid=old.pid)
            patience = timing.patience_seconds
            answer = await self._line.ask(
                "freeze", patience + timing.freeze_seconds, patience_seconds=patience
            )
            self._rests = True
            return float(answer.get("paused_at", monotonic()))
        except LineError as error:
            failure = error
        if not (failure.broken and await self._is_gone()):
            raise HandoverError(str(failure)) from failure
        log.warning("the gateway died while it was being replaced", pid=old.pid, reason=old.outcome)
        return monotonic()

    async def _succeed(self) -> None:
        successor, seconds = self._successor, self._timing.handover_seconds
        if successor.exited.is_set():
            raise HandoverError(f"the new gateway ended before its turn: {successor.outcome}")
        self._takes_over()
        log.info("gateway takes over", pid=successor.pid)
        ready = None
        with trio.move_on_after(seconds):
            await successor.say(GO_FROM_REST_LINE if self._rests else GO_LINE, last=True)
            ready = await successor.said("ready")
        if ready is None:
            raise HandoverError(f"the new gateway was not ready within {seconds:g} s")
        if not ready:
            why = successor.error or await self._outcome_of(successor)
            raise HandoverError(f"the new gateway could not take over: {why}")

    async def _roll_back(self) -> None:
        """Back to how it was: first the successor's exit, then the old one."""
        await self._successor.kill()
        if not self._asked:
            return
        old, line = self._old, self._line
        if line is None or old.exited.is_set():
            return
        try:
            await line.ask("resume", self._timing.resume_seconds)
        except LineError as error:
            # A line that breaks tells a frozen gateway to resume by itself.
            await self.close()
            if not await self._answers():
                log.error("killed: the old gateway does not go on", pid=old.pid, reason=str(error))
                await old.kill()
                return
        log.info("the old gateway goes on", pid=old.pid)

    async def _answers(self) -> bool:
        """Whether the old gateway answers at its socket again."""
        with trio.move_on_after(self._timing.resume_seconds):
            while not self._old.exited.is_set():
                try:
                    line = await self._connect()
                    try:
                        await line.ask("stats", self._timing.resume_seconds)
                        return line.pid == self._old.pid
                    finally:
                        await line.aclose()
                except LineError:
                    await trio.sleep(RETRY_SECONDS)
        return False

    async def dismiss(self) -> None:
        """After `run`: have the old gateway finish its HTTP requests and exit. Returns when it has been told;
        it is killed when it cannot be, since its sockets are the successor's now.
        """
        line = self._line
        try:
            if line is not None and not self._old.exited.is_set():
                await line.ask("leave", self._timing.resume_seconds)
                return  # the line stays open: its end would tell the old gateway that nobody took over
        except LineError as error:
            if not await self._is_gone():
                log.error("killed: the old gateway does not leave", pid=self._old.pid, reason=str(error))
                await self._old.kill()
        except trio.Cancelled:
            with trio.move_on_after(KILL_SECONDS, shield=True):
                await self._old.kill()
            raise

    async def _is_gone(self, seconds: float = EXIT_SHOWS_SECONDS) -> bool:
        with trio.move_on_after(seconds):
            await self._old.exited.wait()
        return self._old.exited.is_set()

    async def _outcome_of(self, child: Child) -> str:
        with trio.move_on_after(EXIT_SHOWS_SECONDS):
            await child.exited.wait()
        return child.error or child.outcome

    async def close(self) -> None:
        """Close the line to the old gateway."""
        line, self._line = self._line, None
        if line is not None:
            with trio.CancelScope(shield=True):
                await line.aclose()
