"""An answer to an HTTP request, as a test looks at it.

Owns the record. Its peer is `_client`, which reads it from the socket.
"""

import json
from dataclasses import dataclass
from typing import Any

__all__ = ["Response"]


@dataclass(frozen=True, slots=True)
class Response:
    """An answer, read to its end."""

    status: int
    header_list: tuple[tuple[str, str], ...]
    """All headers, in order; names in lower case."""
    body: bytes

    @property
    def headers(self) -> dict[str, str]:
        """Headers by lower-case name; of several of one name the last."""
        return dict(self.header_list)

    @property
    def text(self) -> str:
        """The body as UTF-8."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)
