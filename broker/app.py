"""Loading the user's app: from what the command line was given to parties, and from `.env` to `room.env`.

Owns the import of user code and the texts of everything that can go wrong in it. Must run in a host's process
only: no gateway and no supervisor ever imports user code. Its peers are `hibernation.party`, which reads the
classes, and `broker.host`, which starts a host with them.
"""

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Mapping
from difflib import get_close_matches
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from broker.server import Server
from hibernation.errors import AppError, SettingError
from hibernation.party import Party, make_parties

__all__ = ["app_folder", "load_app", "read_env"]

_OURS: Final = ("broker", "hibernation", "storage")
_OUR_FOLDER: Final = str(Path(__file__).resolve().parent.parent)
_ENV_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ENV_ESCAPES: Final = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$"}


def load_app(spec: str, *, search_path: str | os.PathLike[str] = ".") -> list[Party]:
    """Imports an app and gives its parties, in the order in which it defines them.

    `spec` is `module`, `module:Class`, `path/to/file.py` or `path/to/file.py:Class`. A module is looked for
    where Python looks, and then in `search_path`; a path is relative to it. The app's folder is appended to
    `sys.path`, so that its own modules can be imported and cannot take the place of anybody else's.

    Every public `Server` subclass that the module defines is a party; with `:Class` it is that class alone,
    which may also come from elsewhere.

    Raises AppError (HookError, SettingError) whose text says what to do; `details` holds the traceback of the
    app's own frames where its code has failed.
    """
    target, class_name = _split(spec)
    if target.endswith(".py") or "/" in target:
        module = _load_file(Path(search_path, target), spec)
    else:
        module = _load_module(target, Path(search_path))
    return make_parties(_choose_classes(module, class_name))


def app_folder(spec: str, *, search_path: str | os.PathLike[str] = ".") -> Path:
    """The folder that an app's code and its `.env` lie in. Imports nothing; the app need not exist."""
    target, _ = _split(spec)
    if target.endswith(".py") or "/" in target:
        return Path(search_path, target).resolve().parent
    return Path(search_path).resolve()


def _split(spec: str) -> tuple[str, str | None]:
    """The module or path, and the class behind a colon, if one is named."""
    target, colon, name = spec.rpartition(":")
    if not colon:
        target, name = spec, ""
    elif not name.isidentifier():
        raise AppError(f'"{spec}" names no class behind the colon: write module:Class, such as chat:Chat')
    if not target:
        raise AppError(f'"{spec}" names no app: give a module, module:Class or path/to/file.py')
    return target, name or None


# Finding and importing


def _load_file(path: Path, spec: str) -> ModuleType:
    path = path.resolve()
    if path.is_dir():
        _refuse_our_names(path.name)
        files = _python_files(path)
        hint = f", such as {spec.rstrip('/')}/{files[0]}" if files else ""
        raise AppError(f'"{spec}" is a folder: name the file in it{hint}')
    if path.suffix != ".py":
        raise AppError(f'"{spec}" is no Python file: an app is a module, module:Class or path/to/file.py')
    _refuse_our_names(path.stem)
    if not path.is_file():
        near = _nearest(path.name, _python_files(path.parent))
        where = "" if path.parent.is_dir() else f" (there is no folder {path.parent})"
        raise AppError(f"there is no file {path}{where}{near}")
    name = path.stem
    if "." in name:
        raise AppError(f"{path.name} cannot be imported under its name: take the dots out of it")
    _append_to_path(path.parent)
    found = _find_spec(name)
    # The bundled app imports nothing by its own name, so a file of the same name elsewhere may have it.
    bundled = path.is_relative_to(Path(__file__).parent)
    if found is not None and _file_of(found) != path and not bundled:
        raise AppError(
            f"{path.name} has the name of another module, which Python finds first"
            f" ({found.origin or 'a package'}): rename the file"
        )
    return _execute(importlib.util.spec_from_file_location(name, path), path.name)


def _load_module(name: str, folder: Path) -> ModuleType:
    _refuse_our_names(name.partition(".")[0])
    if not all(part.isidentifier() for part in name.split(".")):
        raise AppError(f'"{name}" is no module name: give module, module:Class or path/to/file.py')
    folder = folder.resolve()
    _append_to_path(folder)
    found = _find_module(name)
    if found is None:
        modules = [file.removesuffix(".py") for file in _python_files(folder)]
        raise AppError(f'there is no module "{name}" in {folder}{_nearest(name, modules)}')
    if found.loader is None:
        raise AppError(f'"{name}" is a folder without __init__.py: name a module in it, such as {name}.app')
    own = folder.joinpath(*name.split("."))
    for candidate in (own.with_name(own.name + ".py"), own / "__init__.py"):
        if candidate.is_file() and found.origin and Path(found.origin).resolve() != candidate:
            raise AppError(
                f"{candidate} has the name of another module ({found.origin}), which Python finds first:"
                " rename it"
            )
    return _execute(found, name)


def _refuse_our_names(name: str) -> None:
    if name in _OURS:
        raise AppError(
            f'an app cannot be called "{name}": that is a package of the broker, and `import {name}` always'
            " means that one; rename the app"
        )


def _append_to_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()


def _find_module(name: str) -> ModuleSpec | None:
    """Where Python finds a module; imports the packages around it."""
    if "." not in name:
        return _find_spec(name)
    try:
        found: ModuleSpec | None = _import(lambda: importlib.util.find_spec(name), name)
    except AppError as error:
        missing = getattr(error.__cause__, "name", None)
        if isinstance(error.__cause__, ModuleNotFoundError) and f"{name}.".startswith(f"{missing}."):
            return None
        raise
    return found


def _find_spec(name: str) -> ModuleSpec | None:
    """Where Python finds a top-level module, whether or not one of that name is loaded."""
    for finder in sys.meta_path:
        found = finder.find_spec(name, None)
        if found is not None:
            return found
    return None


def _file_of(found: ModuleSpec) -> Path | None:
    return Path(found.origin).resolve() if found.has_location and found.origin else None


def _execute(found: ModuleSpec | None, shown: str) -> ModuleType:
    """Runs a module's code in a fresh module object; leaves nothing behind in `sys.modules` when it fails."""
    assert found is not None
    assert found.loader is not None
    loader = found.loader
    module = importlib.util.module_from_spec(found)
    before = sys.modules.get(found.name)
    sys.modules[found.name] = module
    try:
        _import(lambda: loader.exec_module(module), shown)
    except BaseException:
        if before is None:
            del sys.modules[found.name]
        else:
            sys.modules[found.name] = before
        raise
    package, _, last = found.name.rpartition(".")
    if package:
        setattr(sys.modules[package], last, module)
    return module


def _import(work: Any, shown: str) -> Any:
    """Runs user code that imports; what it raises becomes an AppError that shows the user's frames alone."""
    try:
        return work()
    except (AppError, SettingError):
        raise
    except SyntaxError as error:
        place = f" ({error.filename}:{error.lineno})" if error.filename else ""
        raise AppError(f"{shown} is not valid Python: {error.msg}{place}", details=_details(error)) from error
    except ModuleNotFoundError as error:
        text = f"{shown} imports {error.name}, and there is no such module: install it, or correct the name"
        raise AppError(text, details=_details(error)) from error
    except SystemExit as error:
        text = f"{shown} ends the process (sys.exit) while it is imported: do not call that at the top level"
        raise AppError(text, details=_details(error)) from error
    except Exception as error:
        text = f"importing {shown} failed: {type(error).__name__}: {error}"
        if isinstance(error, ImportError) and "relative import" in str(error):
            text += "; a file that is part of a package is named as a module: package.module"
        raise AppError(text, details=_details(error)) from error


def _details(error: BaseException) -> str:
    """The traceback without the frames of the import system and of the broker."""
    shown = traceback.TracebackException.from_exception(error)
    level: traceback.TracebackException | None = shown
    while level is not None:
        level.stack = traceback.StackSummary.from_list([f for f in level.stack if _is_users(f.filename)])
        level = level.__cause__ or level.__context__
    return "".join(shown.format()).rstrip()


def _is_users(filename: str) -> bool:
    if filename.startswith("<"):
        return False
    path = Path(filename).resolve()
    return not any(path.is_relative_to(Path(_OUR_FOLDER, package)) for package in _OURS)


# Choosing classes


def _choose_classes(module: ModuleType, class_name: str | None) -> list[type[Server]]:
    servers = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Server) and value is not Server
    }
    defined = list(
        dict.fromkeys(
            server
            for server in servers.values()
            if server.__module__ == module.__name__ and not server.__name__.startswith("_")
        )
    )
    shown = Path(module.__file__).name if module.__file__ else module.__name__
    if class_name is not None:
        if class_name in servers:
            return [servers[class_name]]
        if hasattr(module, class_name):
            raise AppError(f"{class_name} in {shown} is not a subclass of broker.Server")
        raise AppError(f"there is no class {class_name} in {shown}{_nearest(class_name, list(servers))}")
    if defined:
        return defined
    if imported := [server for server in servers.values() if server.__module__ != module.__name__]:
        server = imported[0]
        raise AppError(
            f"{shown} defines no Server of its own; it imports {server.__name__} from {server.__module__}:"
            f" name that module, or {module.__name__}:{server.__name__}"
        )
    raise AppError(
        f"there is no Server in {shown}: an app has at least one class such as\n"
        "\n"
        "    from broker import Server\n"
        "\n"
        "    class Chat(Server):\n"
        "        async def on_message(self, message, sender):\n"
        "            self.room.broadcast(message)"
    )


def _nearest(name: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; there are {', '.join(known[:5])}" if known else ""


def _python_files(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix == ".py" and path.name[0] != "_")
    except OSError:
        return []


# The environment of rooms


def read_env(
    folder: str | os.PathLike[str], variables: Mapping[str, str], environ: Mapping[str, str]
) -> dict[str, str]:
    r"""What `room.env` holds: `environ`, over it the file `.env` in the app's folder, over that `variables`.

    A line of `.env` is empty, a comment (#), or NAME=VALUE, with `export` before it or not. A bare value ends
    at " #" or the line's end. 'Single quotes' keep everything as it is; in "double quotes" \n \r \t \"
    \\ \$ are escapes. Nothing is interpolated.

    Raises AppError that names the line, and never shows a value.
    """
    path = Path(folder, ".env")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        text = ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise AppError(f"{path} cannot be read: {reason}") from None
    values = dict(environ)
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entry = _env_line(line.strip())
        except ValueError as error:
            raise AppError(f"{path}:{number}: {error}") from None
        if entry is not None:
            values[entry[0]] = entry[1]
    values.update(variables)
    return values


def _env_line(line: str) -> tuple[str, str] | None:
    """One stripped line; ValueError says what is wrong with it."""
    if not line or line.startswith("#"):
        return None
    name, equals, value = line.removeprefix("export ").partition("=")
    name, value = name.strip(), value.strip()
    if not equals:
        raise ValueError("write NAME=VALUE, or begin a comment with #")
    if not _ENV_NAME.fullmatch(name):
        raise ValueError("a name has letters, digits and _ only, and does not begin with a digit")
    if "\0" in value:
        raise ValueError("a value cannot hold a NUL")
    if value[:1] not in ("'", '"'):
        return name, "" if value.startswith("#") else re.split(r"\s#", value, maxsplit=1)[0].rstrip()
    quoted, rest = _unquote(value)
    if rest and not rest.startswith("#"):
        raise ValueError("there is text behind the closing quote")
    return name, quoted


def _unquote(value: str) -> tuple[str, str]:
    """The text between the quotes that a value begins with, and what follows them, stripped."""
    quote, index = value[0], 1
    out: list[str] = []
    while index < len(value):
        character = value[index]
        if character == quote:
            return "".join(out), value[index + 1 :].strip()
        if character == "\\" and quote == '"' and value[index + 1 : index + 2] in _ENV_ESCAPES:
            index += 1
            character = _ENV_ESCAPES[value[index]]
        out.append(character)
        index += 1
    raise ValueError(f"the closing {quote} is missing")
