"""What a statement of a room's code may do, and what it may be given.

Owns the authorizer and the clock of one connection, and the check of parameters. Must not execute anything.
Peer: `storage.room_database`, which switches it on for a statement of the room's code, and off again for its
own; those that take the room's tables away have the clock alone.

SQLite asks the authorizer when it compiles a statement, and compiles it once: what was allowed is allowed the
next time too. So the text of a statement of the room's code must never be that of one of ours.
"""

import re
import sqlite3
from collections.abc import Sequence
from math import inf
from time import monotonic
from typing import Any, Final, NoReturn

from storage.errors import SqlError, StorageLimitError
from storage.values import VALUE_BYTES_MAX

__all__ = ["CELL_BYTES_MAX", "INTERNAL", "STATEMENT_BYTES_MAX", "Guard", "Value", "at_once", "bind"]

#: Largest text, blob or row of a table, in bytes; so also the largest parameter.
CELL_BYTES_MAX: Final = VALUE_BYTES_MAX
#: Longest statement, in bytes of UTF-8.
STATEMENT_BYTES_MAX: Final = 100_000
_INTEGER_MAX: Final = 2**63 - 1

#: What SQLite holds.
Value = None | int | float | str | bytes

INTERNAL: Final = frozenset({"_broker_entries", "_broker_outbox", "_broker_facts", "_sqlite_migrations"})
_PREFIXES: Final = ("_broker_", "_sqlite_")
_SQLITE_TABLES: Final = frozenset(
    {
        "sqlite_master",
        "sqlite_schema",
        "sqlite_temp_master",
        "sqlite_temp_schema",
        "sqlite_sequence",
        "sqlite_stat1",
        "sqlite_stat4",
    }
)
_PRAGMAS: Final = frozenset(
    {
        "data_version",
        "foreign_key_check",
        "foreign_key_list",
        "function_list",
        "index_info",
        "index_list",
        "index_xinfo",
        "table_info",
        "table_list",
        "table_xinfo",
    }
)
_MODULES: Final = frozenset({"fts5", "fts5vocab", "rtree", "rtree_i32"})
_FUNCTIONS_REFUSED: Final = frozenset({"load_extension", "fts3_tokenizer"})
_READING: Final = frozenset(
    {
        sqlite3.SQLITE_SELECT,
        sqlite3.SQLITE_READ,
        sqlite3.SQLITE_FUNCTION,
        sqlite3.SQLITE_RECURSIVE,
    }
)
_MAINTENANCE: Final = frozenset({sqlite3.SQLITE_ANALYZE, sqlite3.SQLITE_REINDEX})
_ON_TABLES: Final = frozenset(
    {sqlite3.SQLITE_READ, sqlite3.SQLITE_INSERT, sqlite3.SQLITE_UPDATE, sqlite3.SQLITE_DELETE}
)
_DEFINING: Final = frozenset(
    {
        sqlite3.SQLITE_CREATE_TABLE,
        sqlite3.SQLITE_CREATE_INDEX,
        sqlite3.SQLITE_CREATE_TRIGGER,
        sqlite3.SQLITE_CREATE_VIEW,
        sqlite3.SQLITE_CREATE_VTABLE,
        sqlite3.SQLITE_DROP_TABLE,
        sqlite3.SQLITE_DROP_INDEX,
        sqlite3.SQLITE_DROP_TRIGGER,
        sqlite3.SQLITE_DROP_VIEW,
        sqlite3.SQLITE_DROP_VTABLE,
        sqlite3.SQLITE_ALTER_TABLE,
    }
)
_TEMPORARY: Final = frozenset(
    {
        sqlite3.SQLITE_CREATE_TEMP_TABLE,
        sqlite3.SQLITE_CREATE_TEMP_INDEX,
        sqlite3.SQLITE_CREATE_TEMP_TRIGGER,
        sqlite3.SQLITE_CREATE_TEMP_VIEW,
    }
)
#: What a statement does not say by it: a comment, a text, a name in quotes.
_NOT_SAID: Final = re.compile(
    r"""--[^\n]*|/\*.*?(?:\*/|\Z)|'(?:[^']|'')*'|"(?:[^"]|"")*"|`(?:[^`]|``)*`|\[[^\]]*\]""", re.DOTALL
)
_DEFERRED: Final = re.compile(r"\binitially\s+deferred\b", re.IGNORECASE)
#: The same in a definition that is kept as it is, comments included; or what that does not say. A comment
#: ends where it first can, and nowhere else.
_DEFERRED_THERE: Final = re.compile(
    rf"{_NOT_SAID.pattern}|\b(initially(?:\s|--[^\n]*\n|(?>/\*.*?\*/))+)deferred\b", re.DOTALL | re.IGNORECASE
)
#: Foreign keys are looked at with each statement: what only a COMMIT would find could be told to nobody.
_DEFERRING: Final = frozenset({sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_ALTER_TABLE})
_ONE_TURN: Final = (
    "A turn is one transaction already; use `async with storage.transaction()` for a part of it"
)


class Guard:
    """Of one connection. `authorize` and `is_too_late` are what it calls back."""

    def __init__(self) -> None:
        #: A statement of the room's code is being compiled, or runs.
        self.active = False
        #: When what runs has to end.
        self.deadline = inf
        #: Of that statement: whether SQLite asked about it, it writes, or it is for the sake of SQLite
        #: itself; and why it was refused, with what to do instead.
        self.asked = self.writes = self.maintains = False
        self.refused: tuple[str, str] | None = None
        self.statement = ""

    def begin(self, statement: str, seconds: float) -> None:
        """A statement of the room's code comes; it may take so long."""
        self.statement = statement
        self.asked = self.writes = self.maintains = False
        self.limit(seconds)
        self.active = True

    def limit(self, seconds: float) -> None:
        """Statements of ours come, on the loop thread; all together may take so long."""
        self.refused = None
        self.deadline = monotonic() + seconds

    def end(self) -> None:
        """It has ended, or they have."""
        self.active = False
        self.deadline = inf

    def is_too_late(self) -> bool:
        """Whether what runs has to be interrupted."""
        return monotonic() > self.deadline

    def authorize(
        self, action: int, first: str | None, second: str | None, _database: str | None, _through: str | None
    ) -> int:
        """Whether the statement may do this; see sqlite.org/c3ref/c_alter_table.html for the arguments."""
        if not self.active:
            return sqlite3.SQLITE_OK
        self.asked = True
        if action in _READING:
            if action == sqlite3.SQLITE_READ:
                return self._authorize_table(first or "")
            if action == sqlite3.SQLITE_FUNCTION and (second or "").lower() in _FUNCTIONS_REFUSED:
                return self._refuse(f"the function {second} is not allowed", "Leave it out")
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA:
            if (first or "").lower() in _PRAGMAS:
                return sqlite3.SQLITE_OK
            if (first or "").lower() == "defer_foreign_keys":
                return self._refuse(
                    "PRAGMA defer_foreign_keys is not allowed: foreign keys are checked with each statement",
                    "Insert what is referred to first, or both in one statement",
                )
            return self._refuse(
                f"PRAGMA {first} is not allowed", f"Allowed are {', '.join(sorted(_PRAGMAS))}"
            )
        self.writes = True
        if action in _MAINTENANCE:
            self.maintains = True
            return sqlite3.SQLITE_OK
        if action in _ON_TABLES:
            return self._authorize_table(first or "")
        if action in _DEFINING:
            return self._authorize_definition(action, first or "", second or "")
        if action in _TEMPORARY:
            return self._refuse("temporary tables would not outlive the room's sleep", "Create a plain one")
        if action in (sqlite3.SQLITE_TRANSACTION, sqlite3.SQLITE_SAVEPOINT):
            return self._refuse("transactions are not begun or ended by a statement", _ONE_TURN)
        return self._refuse("it reaches beyond the room's own database", "Use the tables of this room alone")

    def _authorize_table(self, name: str) -> int:
        name = name.lower()
        if name.startswith(_PREFIXES):
            return self._refuse(f"the table {name} is the broker's own", "Use get, put, delete and list")
        if name.startswith("sqlite_") and name not in _SQLITE_TABLES:
            return self._refuse(f"the table {name} is SQLite's own", "Use other tables")
        if name == "dbstat":
            return self._refuse("the table dbstat is SQLite's own", "Use other tables")
        return sqlite3.SQLITE_OK

    def _authorize_definition(self, action: int, first: str, second: str) -> int:
        name = second if action == sqlite3.SQLITE_ALTER_TABLE else first
        on = second if action in (sqlite3.SQLITE_CREATE_TRIGGER, sqlite3.SQLITE_CREATE_INDEX) else ""
        if name.lower().startswith(_PREFIXES) or on.lower().startswith(_PREFIXES):
            return self._refuse(
                f"names that begin with {' or '.join(_PREFIXES)} are the broker's own",
                "Choose another name",
            )
        if action in _DEFERRING and _DEFERRED.search(_NOT_SAID.sub(" ", self.statement)) is not None:
            return self._refuse(
                "a foreign key is checked with each statement, and not later", "Leave out INITIALLY DEFERRED"
            )
        if action == sqlite3.SQLITE_CREATE_VTABLE and second.lower() not in _MODULES:
            return self._refuse(
                f"virtual tables of {second} are not allowed", f"Allowed are {', '.join(sorted(_MODULES))}"
            )
        return sqlite3.SQLITE_OK

    def _refuse(self, reason: str, remedy: str) -> int:
        self.refused = (reason, remedy)
        return sqlite3.SQLITE_DENY


def at_once(definition: str) -> str:
    """Give a table's definition with foreign keys that are looked at with each statement."""
    return _DEFERRED_THERE.sub(
        lambda found: found[0] if found[1] is None else f"{found[1]}IMMEDIATE", definition
    )


def bind(statement: str, parameters: Sequence[Any]) -> tuple[Value, ...]:
    """Give the parameters as SQLite takes them.

    Raises:
        TypeError: the statement is no str.
        SqlError: a parameter is of a kind that SQLite has not.
        StorageLimitError: the statement or a parameter is too large.
    """
    if not isinstance(statement, str):
        raise TypeError(f"a statement is a str, not {type(statement).__name__}")
    if _text_bytes(statement, statement, "the statement") > STATEMENT_BYTES_MAX:
        raise StorageLimitError(
            "the statement (bytes)",
            len(statement.encode()),
            STATEMENT_BYTES_MAX,
            "Give values as parameters, and split what is left",
        )
    for number, value in enumerate(parameters, 1):
        kind = type(value)
        if value is None or kind is float or kind is bool:
            continue
        what = f"parameter {number}"
        if kind is int:
            if not -_INTEGER_MAX - 1 <= value <= _INTEGER_MAX:
                raise SqlError(statement, f"{what} has more than 64 bits", "Give it as text, or as bytes")
            continue
        if kind is str:
            size = _text_bytes(value, statement, what)
        elif kind is bytes:
            size = len(value)
        else:
            _refuse_parameter(statement, what, value)
        if size > CELL_BYTES_MAX:
            raise StorageLimitError(f"{what} (bytes)", size, CELL_BYTES_MAX, "Split it over several rows")
    return tuple(parameters)


def _text_bytes(text: str, statement: str, what: str) -> int:
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise SqlError(
            statement.encode("utf-8", "replace").decode(),
            f"{what} holds a lone surrogate, which UTF-8 cannot hold",
            "Clean it with text.encode('utf-8', 'replace').decode()",
        ) from None


def _refuse_parameter(statement: str, what: str, value: object) -> NoReturn:
    name = type(value).__name__
    remedies: dict[str, str] = {
        "datetime": "Give x.isoformat() or x.timestamp()",
        "date": "Give x.isoformat()",
        "Decimal": "Give str(x)",
        "UUID": "Give str(x) or x.bytes",
        "bytearray": "Give bytes(x)",
        "memoryview": "Give bytes(x)",
        "tuple": "Give several parameters, one after another, or json.dumps(x)",
        "list": "Give several parameters, one after another: sql(query, *x); or json.dumps(x)",
        "dict": "Give its values one after another, or json.dumps(x)",
    }
    remedy = remedies.get(name, "Give None, int, float, str or bytes")
    raise SqlError(statement, f"{what} is a {name}, which SQLite does not hold", remedy)
