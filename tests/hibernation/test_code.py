"""Which code a host runs: another number when a module of the app changes, and no other time (S4, S23)."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hibernation.code import code_of
from hibernation.party import Party, make_parties


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "helper_of_code.py").write_text("x = 1\n")
    (tmp_path / "app_of_code.py").write_text(
        "import helper_of_code\nfrom broker import Server\n\n\nclass Main(Server):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("app_of_code", "helper_of_code"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.import_module("app_of_code")
    yield tmp_path
    for name in ("app_of_code", "helper_of_code"):
        sys.modules.pop(name, None)


def parties() -> list[Party]:
    return make_parties([sys.modules["app_of_code"].Main])


@pytest.mark.parametrize("file", ["app_of_code.py", "helper_of_code.py"])
def test_it_changes_with_each_module_of_the_apps_folder(app, file):
    before = code_of(parties())
    assert 0 <= before < 1 << 63
    assert code_of(parties()) == before
    status = (app / file).stat()
    os.utime(app / file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert code_of(parties()) != before


def test_it_does_not_change_with_other_files(app):
    before = code_of(parties())
    (app / "notes.txt").write_text("x")
    (app / "not_loaded.py").write_text("x = 1\n")
    assert code_of(parties()) == before


def test_a_module_that_has_been_deleted_is_no_error(app):
    before = code_of(parties())
    (app / "helper_of_code.py").unlink()
    assert code_of(parties()) != before
