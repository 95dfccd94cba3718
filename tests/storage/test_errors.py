"""Errors of storage: one tree, facts as fields, texts with path, reason and remedy."""

import inspect

import pytest

from storage import errors
from storage.errors import (
    BrokerError,
    CommitRefused,
    CommitUnknown,
    DatabaseDamaged,
    DataDirectoryError,
    DataDirectoryInUse,
    GenerationPassed,
    SchemaTooNew,
    StorageLimitError,
    ValueEncodingError,
)


def test_all_errors_are_of_one_tree():
    kinds = [
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__
    ]
    assert len(kinds) >= 10
    assert all(issubclass(kind, BrokerError) for kind in kinds)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (DataDirectoryError("/d", "it is odd", "Mend it"), ["/d: it is odd. Mend it."]),
        (DataDirectoryInUse("/d", "the database", 12), ["/d", "process 12", "--data"]),
        (DataDirectoryInUse("/d", "the database", None), ["another process"]),
        (DatabaseDamaged("/d", "odd"), ["/d", "odd", "not touched", "backup"]),
        (SchemaTooNew(3, 2, "/d"), ["/d", "version 3", "up to 2", "not touched", "newer broker"]),
        (StorageLimitError("the key (bytes)", 2049, 2048, "Shorten it"), ["2,049", "2,048", "Shorten it."]),
        (ValueEncodingError("odd", "Mend it", where="value['a']"), ["value['a']: odd. Mend it."]),
        (ValueEncodingError("odd", "Mend it"), ["odd. Mend it."]),
        (CommitRefused("/d", "full", "Free some"), ["/d", "nothing was written", "full", "Free some."]),
        (CommitUnknown("/d", "EIO"), ["/d", "unknown", "EIO", "End this process"]),
        (GenerationPassed("/d", 1, 2), ["/d", "generation 1", "generation 2", "Nothing was written"]),
    ],
)
def test_texts_say_what_where_and_what_to_do(error, parts):
    for part in parts:
        assert part in str(error)
