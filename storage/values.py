"""The codec of stored values: room storage and connection state, as CBOR (RFC 8949).

Owns one domain of values, checked by one walk in both directions: `encode` accepts exactly what `decode`
    gives back.
A value comes back with the type it went in with, but for two: a tuple outside a key comes back as a list, a
    frozenset
outside a key or a set as a set. Everything else that CBOR libraries would convert on the way (enums,
subclasses, decimals, dataclasses) is refused with the conversion to write instead. Never pickle; no tag
outside `TAGS_ALLOWED`.

What the bounds stop: `DEPTH_MAX` recursion, `bytes_max` memory (an item takes a byte at least, so it bounds
    the items
too, also of a small value that refers to one list many times), `INTEGER_BITS_MAX` arithmetic on giant
integers.
"""

import io
import math
from collections.abc import Callable, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, NoReturn
from uuid import UUID

import cbor2

from storage.errors import StorageLimitError, ValueEncodingError

VALUE_BYTES_MAX = 2 * 1024 * 1024
"""Largest encoded value, in bytes (S27)."""

DEPTH_MAX = 32
"""Containers inside one another, the outermost counted as one."""

INTEGER_BITS_MAX = 1024
"""Size of an integer. CBOR has 64 bits natively; larger ones travel as tags 2 and 3."""

TAGS_ALLOWED = frozenset({0, 1, 2, 3, 258, 1004})
"""Date and time as text (0) or seconds (1), large integers (2, 3; RFC 8949 3.4), set (258), date (1004, RFC
8943).
"""

_TAGS_OF_CBOR2 = (4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 260, 261, 43000, 55799)
"""The other tags that cbor2 interprets by itself: fractions, references, patterns, MIME, addresses, and so
on.
"""


# Nothing to check about these, wherever they are.
_PLAIN = frozenset({str, bytes, bool, type(None), date})


class _Unfit(Exception):
    """A value outside the domain. Each container on the way out puts its own step in front of `path`."""

    def __init__(self, reason: str, remedy: str, type_name: str = "") -> None:
        self.reason = reason
        self.remedy = remedy
        self.type_name = type_name
        self.path = ""


class _OverBudget(Exception):
    """More items than bytes are allowed."""


def encode(value: Any, *, bytes_max: int = VALUE_BYTES_MAX, what: str = "value") -> bytes:
    """Give the CBOR bytes of `value`.

    Args:
        value: None, bool, int, float, str, bytes, aware datetime, date, or list, tuple, dict, set and
            frozenset of these.
        bytes_max: largest result, in bytes.
        what: how error texts call the value.

    Raises:
        ValueEncodingError: the value, or something in it, is of another kind; names the place and the remedy.
        StorageLimitError: the result would be larger than `bytes_max`.
    """
    kind = type(value)
    try:
        if kind not in _PLAIN:
            _check(value, kind, 0, False, [bytes_max])
        data = cbor2.dumps(value)
    except _Unfit as unfit:
        raise ValueEncodingError(
            unfit.reason, unfit.remedy, where=what + unfit.path, type_name=unfit.type_name
        ) from None
    except _OverBudget:
        raise _too_large(what, bytes_max + 1, bytes_max) from None
    except UnicodeEncodeError:
        raise ValueEncodingError(
            "a text in it holds a lone surrogate, which UTF-8 cannot hold",
            "Clean it with text.encode('utf-8', 'replace').decode()",
            where=what + _find_surrogate(value),
            type_name="str",
        ) from None
    except (cbor2.CBORError, RecursionError) as error:
        raise ValueEncodingError(
            f"it cannot be encoded: {error}", "Store plain values", where=what
        ) from error
    if len(data) > bytes_max:
        raise _too_large(what, len(data), bytes_max)
    return data


def decode(data: bytes, *, bytes_max: int = VALUE_BYTES_MAX) -> Any:
    """Give the value whose CBOR bytes are `data`: one item of the domain, and nothing after it.

    Raises:
        ValueEncodingError: anything else, whatever is wrong with it.
    """
    if len(data) > bytes_max:
        raise _not_a_value(f"{len(data):,} bytes are over the limit of {bytes_max:,}")
    stream = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(
        stream,
        tag_hook=_refuse,
        semantic_decoders=_REFUSE_TAGS,
        max_depth=DEPTH_MAX,
        allow_indefinite=False,
        allow_duplicate_keys=False,
        read_size=1,
    )
    try:
        value = decoder.decode()
        kind = type(value)
        if kind not in _PLAIN:
            _check(value, kind, 0, False, [bytes_max])
    except _Unfit as unfit:
        raise _not_a_value(f"at value{unfit.path}: {unfit.reason}") from None
    except (
        cbor2.CBORError,
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        MemoryError,
        _OverBudget,
    ) as error:
        raise _not_a_value(str(error) or type(error).__name__) from error
    if stream.tell() != len(data):
        raise _not_a_value(f"{len(data) - stream.tell():,} bytes follow after its end")
    return value


def _check(value: Any, kind: type, depth: int, hashed: bool, budget: list[int]) -> None:
    """Raise _Unfit unless `value` is in the domain.

    Args:
        value: any value.
        kind: its type.
        depth: containers around it.
        hashed: whether it is a key, a member of a set, or inside one.
        budget: one number, the items that may still come.
    """
    if kind in _PLAIN:
        return
    if kind is int:
        if value.bit_length() > INTEGER_BITS_MAX:
            raise _Unfit(
                f"an integer of {value.bit_length():,} bits (limit {INTEGER_BITS_MAX})",
                "Store it as bytes or as text",
                "int",
            )
    elif kind is float:
        if hashed and math.isnan(value):
            raise _Unfit(
                "NaN equals nothing, so it can be neither a key nor a member", "Leave it out", "float"
            )
    elif kind is datetime:
        if value.utcoffset() is None:
            raise _Unfit("a datetime without a time zone", "Use datetime.now(timezone.utc)", "datetime")
    elif (kind is list and not hashed) or kind is tuple:
        _enter(value, kind, depth, budget)
        for index, item in enumerate(value):
            kind = type(item)
            if kind not in _PLAIN:
                try:
                    _check(item, kind, depth + 1, hashed, budget)
                except _Unfit as unfit:
                    unfit.path = f"[{index}]{unfit.path}"
                    raise
    elif kind is dict and not hashed:
        _enter(value, kind, depth, budget)
        for key, item in value.items():
            kind = type(key)
            if kind not in _PLAIN:
                try:
                    _check(key, kind, depth + 1, True, budget)
                except _Unfit as unfit:
                    unfit.path = f", key {_short(key)}"
                    raise
            kind = type(item)
            if kind not in _PLAIN:
                try:
                    _check(item, kind, depth + 1, False, budget)
                except _Unfit as unfit:
                    unfit.path = f"[{_short(key)}]{unfit.path}"
                    raise
    elif (kind is set and not hashed) or kind is frozenset:
        _enter(value, kind, depth, budget)
        for item in value:
            kind = type(item)
            if kind not in _PLAIN:
                try:
                    _check(item, kind, depth + 1, True, budget)
                except _Unfit as unfit:
                    unfit.path = f", member {_short(item)}"
                    raise
    else:
        raise _unfit_type(value, kind)


def _enter(container: Any, kind: type, depth: int, budget: list[int]) -> None:
    """Go one level down: take the container's items off the budget, before looking at any."""
    if depth >= DEPTH_MAX:
        raise _Unfit(
            f"nested more than {DEPTH_MAX} deep, or containing itself",
            "Store flatter values, or ids",
            kind.__name__,
        )
    budget[0] -= 1 + len(container) * (2 if kind is dict else 1)
    if budget[0] < 0:
        raise _OverBudget


_Remedy = tuple[type, str]
_REMEDIES: tuple[_Remedy, ...] = (
    (Enum, "Store its .value"),
    (bool, "Store bool(x)"),
    (int, "Store int(x)"),
    (float, "Store float(x)"),
    (str, "Store str(x)"),
    (bytes, "Store bytes(x)"),
    (bytearray, "Store bytes(x)"),
    (memoryview, "Store bytes(x)"),
    (Decimal, "Store str(x), and read it back with Decimal(text)"),
    (Fraction, "Store (x.numerator, x.denominator)"),
    (UUID, "Store x.bytes or str(x)"),
    (timedelta, "Store x.total_seconds()"),
    (time, "Store x.isoformat()"),
    (datetime, "Store a plain datetime"),
    (date, "Store a plain date"),
    (dict, "Store dict(x)"),
    (Mapping, "Store dict(x)"),
    (list, "Store list(x)"),
    (set, "Store set(x)"),
    (frozenset, "Store frozenset(x)"),
)


def _unfit_type(value: Any, kind: type) -> _Unfit:
    name = kind.__qualname__
    if hasattr(kind, "__dataclass_fields__"):
        remedy = "Store dataclasses.asdict(x), and build the object from it after reading"
    elif isinstance(value, tuple):
        remedy = "Store x._asdict()" if hasattr(kind, "_asdict") else "Store list(x)"
    else:
        remedy = next(
            (text for base, text in _REMEDIES if isinstance(value, base)),
            "Store plain values (None, bool, int, float, str, bytes, datetime, date, list, dict, set)",
        )
    return _Unfit(f"a {name} cannot be stored as it is", remedy, name)


def _short(key: Any) -> str:
    try:
        text = repr(key)
    except Exception:  # noqa: BLE001 - a user's own __repr__
        text = f"<{type(key).__name__}>"
    return text if len(text) <= 40 else text[:37] + "..."


def _find_surrogate(value: Any) -> str:
    """Path of the first text with a lone surrogate. Only for error texts: the value passed `_check`."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return ""
        return "?"
    steps: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        steps = [(f", key {_short(key)}", key) for key in value]
        steps += [(f"[{_short(key)}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        steps = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif isinstance(value, (set, frozenset)):
        steps = [(f", member {_short(item)}", item) for item in value]
    for step, item in steps:
        if (rest := _find_surrogate(item)) != "?":
            return step + rest
    return "?"


def _too_large(what: str, given: int, limit: int) -> StorageLimitError:
    return StorageLimitError(
        f"the {what} (bytes)", given, limit, "Store less in one value, or split it over several keys"
    )


def _not_a_value(reason: str) -> ValueEncodingError:
    return ValueEncodingError(
        f"the stored bytes are not a value: {reason}",
        "They were not written by this codec, or the file is damaged",
    )


def _refuse(*_args: Any, **_options: Any) -> NoReturn:
    raise ValueError("a tag that is not allowed")


_REFUSE_TAGS: Mapping[int, Callable[..., NoReturn]] = dict.fromkeys(_TAGS_OF_CBOR2, _refuse)
