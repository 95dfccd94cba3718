"""Notices a handler that blocks the event loop of its host, and says in the log where it stands.

Owns one daemon thread. It asks the loop for a sign of life twice a second; when none comes, it logs the room
whose turn was begun last and the stack of the loop's thread, once per blockage, and notes it for the host
that comes next. It kills nothing: that is the supervisor's, which misses the beat of the same loop.
"""

import sys
import threading
import traceback
from collections.abc import Callable

import trio

from hibernation.logs import get_logger

#: How long the loop may take to answer before it counts as blocked.
ANSWER_SECONDS = 0.5

log = get_logger("watchdog")


class Watchdog:
    """Start it from the thread that runs the loop; `stop` it before the loop ends.

    Args:
        active: Tells the room whose turn was begun last, "party/id".
        token: Of the loop to watch.
        blocked: Called on the watchdog's thread with True when the loop does not answer, with False when it
            does again.
    """

    def __init__(
        self, active: Callable[[], str], token: trio.lowlevel.TrioToken, blocked: Callable[[bool], None]
    ) -> None:
        self._active = active
        self._token = token
        self._blocked = blocked
        self._loop_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and wait for its end."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(ANSWER_SECONDS):
            answered = threading.Event()
            try:
                self._token.run_sync_soon(answered.set)
            except trio.RunFinishedError:
                return
            if answered.wait(ANSWER_SECONDS) or self._stopped.is_set():
                continue
            self._blocked(True)
            frame = sys._current_frames().get(self._loop_thread)
            stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
            log.error(
                "a handler blocks its host: all of the host's rooms wait for it",
                room=self._active(),
                stack=stack,
            )
            while not answered.wait(ANSWER_SECONDS):
                if self._stopped.is_set():
                    return
            self._blocked(False)
            log.warning("the blocked host goes on", room=self._active())
