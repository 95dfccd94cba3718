"""Logging: its form, what it hides, and that it never stands in the way of serving."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hibernation.logs import HIDDEN, hide_secrets

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: logging is set up once per process."""
    wanted: dict[str, Any] = {"capture_output": True, **options}
    return subprocess.run(
        [sys.executable, "-c", f"from hibernation.logs import *\n{code}"],
        cwd=ROOT,
        text=True,
        timeout=30,
        check=False,
        **wanted,
    )


def test_a_line_is_json_where_no_terminal_reads_it():
    done = run(
        "log = get_logger('host')\nconfigure(False, process='host 0')\n"
        "log.debug('unseen')\nlog.info('woke', room='main/a', wakes=2)"
    )
    line = json.loads(done.stderr)
    assert line.pop("timestamp")
    assert line == {
        "event": "woke", "room": "main/a", "wakes": 2, "level": "info", "process": "host 0", "logger": "host",
    }  # fmt: skip
    assert done.stdout == ""


def test_dev_shows_debug_lines_and_a_traceback_is_text():
    done = run("configure(True)\ntry: 1/0\nexcept Exception: get_logger('a').debug('b', exc_info=True)")
    assert "ZeroDivisionError" in json.loads(done.stderr)["exception"]


def test_packages_that_use_the_standard_library_come_out_in_the_same_form():
    done = run(
        "import logging\nconfigure(False)\nlogging.getLogger('hypercorn.error').warning('late: %s', 'x')\n"
        "logging.getLogger('quart.app').info('unseen')"
    )
    line = json.loads(done.stderr)
    assert (line["event"], line["level"], line["logger"]) == ("late: x", "warning", "hypercorn.error")


@pytest.mark.parametrize("name", ["token", "admin_token", "Authorization", "cookie", "variables", "PASSWORD"])
def test_secrets_are_hidden_by_name(name):
    """S39: never logged."""
    assert hide_secrets(None, "info", {name: "canary", "room": "a"}) == {name: HIDDEN, "room": "a"}
    assert hide_secrets(None, "info", {"headers": {name: "canary"}}) == {"headers": {name: HIDDEN}}


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_process_without_standard_streams_goes_on(tmp_path, closed):
    """FAULTS 70: and its first files do not get the streams' numbers."""
    code = (
        "import os\nprotect_standard_streams(); configure(False)\nprint('out'); get_logger('a').info('b')\n"
        f"fd = os.open({str(tmp_path / 'file')!r}, os.O_CREAT | os.O_WRONLY)\n"
        "print('again'); os.write(fd, b'%d' % fd)"
    )
    done = run(
        f"import os, sys\nfor n in {closed}: os.close(n)\n"
        f"os.execv(sys.executable, [sys.executable, '-c', 'from hibernation.logs import *\\n' + {code!r}])"
    )
    assert done.returncode == 0, done.stderr
    assert int((tmp_path / "file").read_text()) > 2


def test_a_reader_that_has_gone_away_makes_no_print_raise():
    """FAULTS 70."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run(
            "import sys, os\nprotect_standard_streams(); configure(False)\n"
            "print('a' * 100000); print('b'); get_logger('a').error('c'); os._exit(3)",
            capture_output=False,
            stdout=writing,
            stderr=writing,
        )
    finally:
        os.close(writing)
    assert done.returncode == 3
