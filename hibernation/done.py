"""`Done`: what storage writes return. They are done when they are called, and may be awaited all the same."""

from collections.abc import Generator
from typing import Any

__all__ = ["Done"]


class Done:
    """Already done: awaiting it gives the value at once."""

    __slots__ = ("_value",)

    def __init__(self, value: Any = None) -> None:
        self._value = value

    def __await__(self) -> Generator[None, None, Any]:
        yield from ()
        return self._value
