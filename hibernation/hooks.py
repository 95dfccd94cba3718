"""Hooks: the table of them, and the checks of a class against it.

Owns which hooks there are, what each is given, and how the errors about them read. Must not call a hook, and
knows nothing of settings, rooms or parties. Its peer is `hibernation.party`.

A hook may be a plain function or a coroutine and may leave off trailing parameters. Hooks are called by
position, so the order of parameters counts and their names do not; a parameter that bears the name of another
position is still refused, because it is nearly always an order remembered wrongly.
"""

import ast
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MemberDescriptorType, WrapperDescriptorType
from typing import Any, Final

from hibernation.errors import HookError

__all__ = ["HOOKS", "Hook", "HookSpec", "check_hooks", "find", "location", "owners", "where"]


@dataclass(frozen=True, slots=True)
class Hook:
    """One line of the table: what a hook is called and given.

    `static`: runs before there is a room, so it has no `self`. `main_only`: only the main party's is ever
    called.
    """

    name: str
    parameters: tuple[str, ...]
    doc: str
    static: bool = False
    main_only: bool = False

    def line(self, *, is_async: bool = True) -> str:
        """The hook as it is written in a class; a static one takes two lines."""
        names = self.parameters if self.static else ("self", *self.parameters)
        line = f"{'async def' if is_async else 'def'} {self.name}({', '.join(names)}): ..."
        return f"@staticmethod\n{line}" if self.static else line


_ROOM_HOOKS = (
    Hook("on_start", (), "Before the first turn after waking."),
    Hook("get_connection_tags", ("connection", "ctx"), "The tags of a new connection: a list of str."),
    Hook("on_connect", ("connection", "ctx"), "A client has connected."),
    Hook("on_message", ("message", "sender"), "A client has sent a message: str or bytes."),
    Hook("on_close", ("connection", "code", "reason", "was_clean"), "A connection has ended; once for each."),
    Hook("on_error", ("connection", "error"), "A hook has raised; connection may be None."),
    Hook("on_request", ("request",), "An HTTP request to this room; returns what a Quart view may return."),
    Hook("on_alarm", ("alarm",), "An alarm that the room has set is due."),
)
_STATIC_HOOKS = (
    Hook("on_before_connect", ("request", "lobby"), "Before a WebSocket is accepted.", static=True),
    Hook("on_before_request", ("request", "lobby"), "Before a request reaches its room.", static=True),
    Hook("on_fetch", ("request", "lobby"), "A request of no room.", static=True, main_only=True),
    Hook("on_cron", ("cron", "lobby"), "A cron is due.", static=True, main_only=True),
)

HOOKS: Final[Mapping[str, Hook]] = {hook.name: hook for hook in (*_ROOM_HOOKS, *_STATIC_HOOKS)}
"""Every hook, in the order of the docs."""

# What other systems, or the memory, call the same thing.
_OTHER_NAMES: Final = {
    "on_open": "on_connect",
    "on_join": "on_connect",
    "on_connection": "on_connect",
    "on_disconnect": "on_close",
    "on_leave": "on_close",
    "on_msg": "on_message",
    "on_receive": "on_message",
    "on_data": "on_message",
    "on_exception": "on_error",
    "on_http": "on_request",
    "on_http_request": "on_request",
    "on_wake": "on_start",
    "on_init": "on_start",
    "on_load": "on_start",
}
_OTHER_PARAMETERS: Final = {
    "conn": ("connection", "sender"),
    "connection": ("sender",),
    "ws": ("connection", "sender"),
    "websocket": ("connection", "sender"),
    "msg": ("message",),
    "context": ("ctx",),
    "exc": ("error",),
    "err": ("error",),
    "exception": ("error",),
    "req": ("request",),
}


@dataclass(frozen=True, slots=True)
class HookSpec:
    """How one hook of one class is called: `server.on_message(*arguments[:spec.parameters])`.

    `parameters` counts those that it takes beside `self`. `is_async` is whether it is a coroutine function; a
    decorator may hide that, so a result that can be awaited is awaited in any case.
    """

    name: str
    parameters: int
    is_async: bool
    is_static: bool


def check_hooks(server: type[Any]) -> dict[str, HookSpec]:
    """Checks the names, the constructor and the hooks of a class, mixins and bases included.

    Returns how each of its hooks is called, by name. Raises HookError.
    """
    _check_names(server)
    _check_init(server)
    specs = {}
    for name, hook in HOOKS.items():
        owner, value = find(server, name)
        if owner is not object:
            specs[name] = _check_hook(hook, owner, value)
    return specs


def _check_names(server: type[Any]) -> None:
    """Refuses names that look like hooks and are none: silence would be hard to explain."""
    for owner in owners(server):
        for name, value in vars(owner).items():
            if name.startswith("_") or name in HOOKS:
                continue
            if name == "room" and not isinstance(value, MemberDescriptorType):
                raise HookError(
                    owner.__name__,
                    name,
                    "`room` is set by the broker, on every room object",
                    location=location(owner, name, value),
                    remedy="give it another name",
                )
            if callable(value) or isinstance(value, staticmethod | classmethod | property):
                _check_method_name(owner, name, value)


def _check_method_name(owner: type[Any], name: str, value: object) -> None:
    snake = re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()
    looks_like_hook = snake.startswith("on_") or bool(
        get_close_matches(snake, ["get_connection_tags"], 1, 0.9)
    )
    if not looks_like_hook or (snake != name and not name.startswith("on") and snake not in HOOKS):
        return
    nearest = snake if snake in HOOKS else _OTHER_NAMES.get(snake)
    if nearest is None:
        nearest = next(iter(get_close_matches(snake, HOOKS, n=1, cutoff=0.6)), None)
    problem = "there is no such hook, and names that begin with on_ are kept for hooks"
    remedy = f"a name of another kind, such as handle_{snake.removeprefix('on_')}"
    if nearest is not None:
        problem = f"there is no such hook; the nearest is {nearest}"
        remedy = f"{HOOKS[nearest].line()}   (a method of your own needs a name of another kind)"
    raise HookError(owner.__name__, name, problem, location=location(owner, name, value), remedy=remedy)


def _check_init(server: type[Any]) -> None:
    owner, value = find(server, "__init__")
    if isinstance(value, WrapperDescriptorType):
        return
    fault = ""
    if inspect.iscoroutinefunction(value):
        fault = "a constructor cannot wait"
    else:
        try:
            inspect.signature(value).bind(None, None)
        except TypeError:
            fault = "a room object is constructed with the room alone"
        except ValueError:
            return
    if fault:
        raise HookError(
            owner.__name__,
            "__init__",
            fault,
            location=location(owner, "__init__", value),
            found=_found("__init__", value),
            remedy="def __init__(self, room): ...   (and load what it needs in async def on_start(self))",
        )


def _check_hook(hook: Hook, owner: type[Any], value: Any) -> HookSpec:
    """One hook as it stands in the class: what it is, then what it takes."""
    is_static = isinstance(value, staticmethod)
    function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
    is_async = _is_async(function) or _is_async(inspect.unwrap(function))

    def fail(problem: str) -> HookError:
        return HookError(
            owner.__name__,
            hook.name,
            problem,
            location=location(owner, hook.name, value),
            found=_found(hook.name, value),
            remedy=hook.line(is_async=is_async or not callable(function)),
        )

    if not callable(function) or not hasattr(type(function), "__get__"):
        raise fail("a hook is a function")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise fail("a hook cannot yield; on_request may return a generator that it has called")
    if hook.static and not is_static:
        raise fail("it runs before there is a room, so it is a static method")
    if not hook.static and isinstance(value, staticmethod | classmethod):
        raise fail("it belongs to one room, so it is a method with self")
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled code may keep its signature to itself
        parameters = len(hook.parameters)
    else:
        parameters = _count_parameters(hook, found, fail)
    return HookSpec(hook.name, parameters, is_async, hook.static)


def _count_parameters(hook: Hook, found: list[inspect.Parameter], fail: Callable[[str], HookError]) -> int:
    """How many of the hook's parameters a function takes. `fail` makes the error for a problem."""
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in found)
    positional = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if not hook.static:
        if not positional and not takes_any:
            raise fail("self is missing")
        if positional and _meant(positional[0].name, hook) is not None:
            raise fail("self is missing")
        positional = positional[1:]
    elif positional and positional[0].name in ("self", "cls"):
        raise fail(f"a static method has no {positional[0].name}")
    for p in found:
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty:
            raise fail(f"hooks are called by position, and `{p.name}` can only be given by name")
    for index, p in enumerate(positional[: len(hook.parameters)]):
        meant = _meant(p.name, hook)
        if meant is not None and hook.parameters[index] != meant:
            raise fail(
                f"hooks are called by position, so `{p.name}` would be given the {hook.parameters[index]};"
                " only trailing parameters can be left off"
            )
    required = sum(p.default is p.empty for p in positional)
    given = len(hook.parameters)
    if required > given:
        raise fail(f"it wants {_counted(required)}, and is given {_counted(given, hook.parameters)}")
    return given if takes_any else min(len(positional), given)


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _meant(name: str, hook: Hook) -> str | None:
    """Which of the hook's parameters somebody means who calls one so, or None for a name of their own."""
    name = name.strip("_")
    if name in hook.parameters:
        return name
    return next((other for other in _OTHER_PARAMETERS.get(name, ()) if other in hook.parameters), None)


def _counted(count: int, names: Iterable[str] = ()) -> str:
    text = f"{count} parameter{'' if count == 1 else 's'}" if count else "no parameters"
    listed = ", ".join(names)
    return f"{text} ({listed})" if listed else text


# Where things stand


def owners(server: type[Any]) -> Iterator[type[Any]]:
    """The class and its bases, nearest first."""
    return (owner for owner in server.__mro__ if owner is not object)


def find(server: type[Any], name: str) -> tuple[type[Any], Any]:
    """The class that an attribute comes from, and its raw value; (object, None) where there is none."""
    for owner in owners(server):
        if name in vars(owner):
            return owner, vars(owner)[name]
    return object, vars(object).get(name)


def _found(name: str, value: Any) -> str:
    """A definition as one line, for an error; a value that is no function as an assignment."""
    prefix = {staticmethod: "@staticmethod ", classmethod: "@classmethod "}.get(type(value), "")
    function = getattr(value, "__func__", value)
    if not inspect.isfunction(function):
        return f"{name} = {function!r}"
    word = "async def" if _is_async(function) else "def"
    return f"{prefix}{word} {name}{inspect.signature(function)}"


def where(owner: type[Any], name: str = "", value: object = None) -> str:
    """`location` in brackets, to stand behind a name."""
    found = location(owner, name, value)
    return f" ({found})" if found else ""


def location(owner: type[Any], name: str, value: object) -> str:
    """`path:line` of an attribute, or of the class where `name` is ""; "" where there is no source."""
    function = inspect.unwrap(getattr(value, "__func__", value))  # type: ignore[arg-type]
    if code := getattr(function, "__code__", None):
        return f"{_short(code.co_filename)}:{code.co_firstlineno}"
    path = getattr(sys.modules.get(owner.__module__), "__file__", None)
    if path is None:
        return ""
    try:
        with open(path, "rb") as file:
            tree = ast.parse(file.read())
    except (OSError, SyntaxError, ValueError):
        return ""
    node = _definition(tree, owner.__qualname__.replace("<locals>.", "").split("."))
    if not isinstance(node, ast.ClassDef):
        return _short(path)
    return f"{_short(path)}:{_assignment_line(node, name) or node.lineno}"


def _definition(node: ast.AST, names: list[str]) -> ast.AST | None:
    """The class or function that is reached by these names, through the functions and classes around it."""
    if not names:
        return node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = _definition(child, names[1:]) if child.name == names[0] else None
        else:
            found = _definition(child, names)  # a class may stand in an `if` or a `with`
        if found is not None:
            return found
    return None


def _assignment_line(body: ast.ClassDef, name: str) -> int | None:
    for node in body.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node.lineno
    return None


def _short(path: str) -> str:
    """A path as the reader would type it: relative where it lies below the working directory."""
    try:
        relative = os.path.relpath(path)
    except (OSError, ValueError):
        return path
    return path if relative.startswith("..") else relative
