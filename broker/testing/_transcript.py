"""What has happened so far, for the text of a failure: who said what to whom, and when on the virtual clock.

Owns the lines and their form. Bounded: only the last ones are kept.
"""

from collections import deque
from typing import Any, Final

__all__ = ["Transcript"]

LINES_KEPT: Final = 1000
LINES_SHOWN: Final = 40
CHARACTERS_MAX: Final = 200


class Transcript:
    """See the module. `seed` stands in its head."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._count = 0

    def add(self, at: float, text: str) -> None:
        """Take note of something."""
        self._count += 1
        self._lines.append(f"  {at:9.3f}  {text}")

    def show(self) -> str:
        """The last lines, ready to be printed."""
        shown = list(self._lines)[-LINES_SHOWN:]
        left_out = self._count - len(shown)
        head = f"what happened (virtual seconds; seed {self.seed}"
        head += f"; the first {left_out} lines are left out):" if left_out else "):"
        return "\n".join([head, *(shown or ["  nothing"])])


def brief(value: Any) -> str:
    """A value on one line, cut if it is long."""
    text = repr(value)
    return text if len(text) <= CHARACTERS_MAX else f"{text[:CHARACTERS_MAX]}… ({len(text)} characters)"
