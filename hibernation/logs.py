"""Logging of all processes: structlog on standard error, lines for people on a terminal, JSON elsewhere.

Owns the form of a log line and what must not stand in one. Nothing here raises or stops the process when
standard error is closed, full or gone: a broker that cannot log goes on serving.
"""

import io
import logging
import os
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import structlog
from structlog.typing import FilteringBoundLogger, Processor

__all__ = ["configure", "get_logger", "hide_secrets", "protect_standard_streams", "why"]

SECRET_WORDS = ("token", "secret", "password", "authorization", "cookie", "variables", "environ")
"""A field whose name holds one of these is logged without its value."""

HIDDEN = "[hidden]"


class _StandardError:
    """Writes whole lines to whatever `sys.stderr` is at that moment, and drops what cannot be written."""

    def __init__(self, name: str = "") -> None:
        self.name = name

    def msg(self, message: str) -> None:
        """Write one line (with a traceback: several) in one call, so that processes do not interleave."""
        stream = sys.stderr
        if stream is None:
            return
        try:
            stream.write(message + "\n")
            stream.flush()
        except (OSError, ValueError):  # ValueError: the stream has been closed
            return

    log = debug = info = warn = warning = msg
    fatal = failure = err = error = critical = exception = msg


def hide_secrets(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the values of fields that are secret by name, in the event and in mappings directly in it."""
    for name, value in event.items():
        if _is_secret(name):
            event[name] = HIDDEN
        elif isinstance(value, Mapping):
            event[name] = {key: HIDDEN if _is_secret(str(key)) else item for key, item in value.items()}
    return event


def _is_secret(name: str) -> bool:
    lowered = name.lower()
    return any(word in lowered for word in SECRET_WORDS)


def configure(dev: bool, *, process: str = "") -> None:
    """Set up logging of this process; called once, first thing.

    `dev` adds debug lines. `process` ("gateway", "host 0") stands in every line. Packages that log through
    the standard library (hypercorn, quart) come out in the same form, from warnings on.
    """
    terminal = _is_terminal()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
        _Name(process),
        hide_secrets,
    ]
    final: list[Processor]
    if terminal:
        final = [
            structlog.dev.ConsoleRenderer(
                colors="NO_COLOR" not in os.environ,
                exception_formatter=structlog.dev.plain_traceback,
                pad_event_to=0,
            )
        ]
    else:
        final = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG if dev else logging.INFO),
        logger_factory=_StandardError,
        cache_logger_on_first_use=True,
    )
    _configure_standard_library(shared, final)


def get_logger(name: str) -> FilteringBoundLogger:
    """Give the logger called `name`; may be made at import, before `configure`."""
    logger: FilteringBoundLogger = structlog.get_logger(name)
    return logger


def why(reason: str) -> dict[str, str]:
    """Give a reason as a field of a log line; one of several lines stands below it, as tracebacks do."""
    return {"exception" if "\n" in reason else "reason": reason}


class _Name:
    """Adds the names of the process and of the logger."""

    def __init__(self, process: str) -> None:
        self._process = process

    def __call__(
        self, logger: object, _method: str, event: MutableMapping[str, Any]
    ) -> MutableMapping[str, Any]:
        if self._process:
            event["process"] = self._process
        record = event.get("_record")
        name = getattr(logger, "name", "") if record is None else record.name
        if name:
            event["logger"] = name
        return event


class _ToStandardError(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self._out = _StandardError()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:  # noqa: BLE001 - a record that cannot be formatted must not stop its writer
            line = f"unreadable log record of {record.name}"
        self._out.msg(line)


def _configure_standard_library(shared: list[Processor], final: list[Processor]) -> None:
    handler = _ToStandardError()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except (OSError, ValueError):
        return False


class _ForgivingText(io.TextIOWrapper):
    """A standard stream that drops what it cannot write."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            return


def protect_standard_streams() -> None:
    """Make sure that descriptors 0 to 2 exist, and that writing to a closed one harms nothing.

    A process started without them would give their numbers to its first sockets, and a `print` in a room's
    code would end in a client's stream. A reader of our output that went away (`broker serve | head -1`)
    would otherwise make the next `print` raise in the middle of a turn.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            os.set_inheritable(number, True)
    sys.stdout = _forgiving(1)
    sys.stderr = _forgiving(2)


def _forgiving(number: int) -> _ForgivingText:
    raw = open(number, "wb", buffering=0, closefd=False)  # noqa: SIM115 - lives as long as the process
    return _ForgivingText(
        raw,  # unbuffered: what is written is out, whatever ends the process
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
        write_through=True,
    )
