"""The answer to a request, ready for the link. Owns one record, which needs nothing of Quart's."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

__all__ = ["Reply"]


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request, ready for the link.

    An iterator `body` runs outside of any turn; whoever takes it must call its `aclose`, also after an error.
    """

    status: int
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes | AsyncIterator[bytes] = b""
