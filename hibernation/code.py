"""Which code a host runs: a number that changes when a module of the app's folder does.

Owns that number and nothing else. What was blamed or put into quarantine with one code is tried again with
another (S4, S23).
"""

import os
import sys
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from hibernation.party import Party

__all__ = ["code_of"]


def code_of(parties: Iterable[Party]) -> int:
    """63 bits made of the names, times and sizes of all modules that have been loaded from the folders of the
    parties' classes.
    """
    folders = set()
    for party in parties:
        file = getattr(sys.modules.get(party.cls.__module__), "__file__", None)
        if file:
            folders.add(str(Path(os.path.abspath(file)).parent) + os.sep)
    facts = []
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str):
            continue
        path = os.path.abspath(file)
        if any(path.startswith(folder) for folder in folders):
            try:
                status = os.stat(path)
            except OSError:
                continue
            facts.append((path, status.st_mtime_ns, status.st_size))
    digest = blake2b(repr(sorted(facts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
