"""What `pip install .` gives: complete, typed, and indifferent to the folder it is run from."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
import zipfile
from contextlib import suppress
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

ROOT = Path(__file__).parent.parent
PACKAGES = ("broker", "hibernation", "storage")
START_SECONDS = 60
STOP_SECONDS = 30

APP = """
from broker import Server


class Echo(Server):
    def on_message(self, message, sender):
        sender.send(message)

    def on_request(self, request):
        return "room " + self.room.id
"""


def run(*command: object, cwd: Path | None = None) -> str:
    """Run a command to its end and return what it printed; its output is the failure's text."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources() -> set[str]:
    """Every file of the packages, as a path from the repository's root."""
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build folder left in the checkout would end up in it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", "--quiet", *options, source)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what requirements.txt locks, and nothing else.

    The locked packages are links to those of the environment that runs the tests: that costs neither time nor
    network. Packages for development are not linked: code that imports one fails here.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for name in re.findall(r"(?m)^([\w.-]+)==", (ROOT / "requirements.txt").read_text()):
        package = distribution(name)
        tops = {file.parts[0] for file in package.files or () if file.parts[0] not in {"..", "__pycache__"}}
        for top in tops:
            if not (site_packages / top).exists():
                (site_packages / top).symlink_to(Path(str(package.locate_file(top))).resolve())
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: an app, and packages that share a name with ours and must not be imported."""
    (tmp_path / "app.py").write_text(APP)
    for name in ("storage", "hibernation"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise RuntimeError('the {name}/ of the user')\n")
    return tmp_path


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == sources()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names


def test_the_locked_packages_are_what_the_project_declares(environment):
    assert "No broken requirements" in run(
        sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "check"
    )


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_locked_requirements_have_hashes_and_name_no_place_of_download(name):
    text = (ROOT / name).read_text()
    entries = re.split(r"(?m)^(?=[\w.-]+==)", text)[1:]
    assert entries
    assert [entry.splitlines()[0] for entry in entries if "--hash=sha256:" not in entry] == []
    assert re.findall(r"://|--(?:extra-)?index-url|--find-links|--trusted-host", text) == []


def test_the_version_is_told_from_a_folder_with_a_storage_of_its_own(environment, folder):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in run(environment / "bin" / "broker", "--version", cwd=folder)


def test_it_serves_from_a_folder_with_a_storage_of_its_own(environment, folder):
    with subprocess.Popen(
        [environment / "bin" / "broker", "serve", "app.py", "--bind", "127.0.0.1:0"],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        lines: list[str] = []
        ready = threading.Event()

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line)
                if line.startswith("ready on "):
                    ready.set()
            ready.set()  # nothing more will come

        reader = threading.Thread(target=read)
        reader.start()
        try:
            ready.wait(START_SECONDS)
            address = re.search(r"(?m)^ready on http://(127\.0\.0\.1:\d+)$", "".join(lines))
            assert address, "".join(lines)
            with connect(f"ws://{address[1]}/party/lobby", open_timeout=20, close_timeout=20) as socket:
                socket.send("hello")
                assert socket.recv(timeout=20) == "hello"
            answer = httpx.get(f"http://{address[1]}/party/lobby", timeout=20)
            assert answer.text == "room lobby"

            process.send_signal(signal.SIGTERM)
            assert process.wait(STOP_SECONDS) == 0, "".join(lines)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            reader.join(20)
