"""Server-sent events as text: one event at a time, for a generator that `on_request` returns.

Owns the form of an event (WHATWG HTML, 9.2, "Server-sent events"). Knows nothing of requests.
"""

import re
from json import dumps as dump_json
from typing import Any, Final

__all__ = ["sse"]

#: What ends a line to the reader of an event stream, and so cannot stand within one.
_LINE_END: Final = re.compile(r"\r\n|\r|\n")


def sse(
    data: Any = None,
    *,
    event: str | None = None,
    id: str | None = None,  # noqa: A002 - it is the field's name
    retry: int | None = None,
    comment: str | None = None,
) -> bytes:
    """One server-sent event, to be yielded by a generator with the content type `text/event-stream`.

        async def ticks(self):
            while True:
                yield sse({"time": time.time()}, event="tick")
                await trio.sleep(1)

    Args:
        data: Text, of as many lines as it has, or anything else as JSON. None: no data, so no event is seen;
            the other fields count all the same.
        event: Its type; without it `message`.
        id: What the client says as `Last-Event-ID` when it comes again.
        retry: Milliseconds after which a client that has lost the connection comes again.
        comment: Text that no client sees: something to send when there is nothing to say.

    Raises:
        ValueError: A line break in `event` or `id`, a NUL in `id`, or a negative `retry`.
    """
    lines = []
    if comment is not None:
        lines += [f": {line}" for line in _LINE_END.split(comment)]
    for name, value in (("id", id), ("event", event)):
        if value is not None:
            if _LINE_END.search(value) or "\0" in value:
                raise ValueError(f"the {name} of an event is one line without NUL, not {value!r}")
            lines.append(f"{name}: {value}")
    if retry is not None:
        if type(retry) is not int or retry < 0:
            raise ValueError(f"retry is a number of milliseconds from 0, not {retry!r}")
        lines.append(f"retry: {retry}")
    if data is not None:
        text = data if isinstance(data, str) else dump_json(data, separators=(",", ":"), ensure_ascii=False)
        lines += [f"data: {line}" for line in _LINE_END.split(text)]
    return ("\n".join(lines) + "\n\n").encode()
