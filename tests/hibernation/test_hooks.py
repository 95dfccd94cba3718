"""What is said of a class whose hooks cannot be called; each text is what its author reads."""

import functools
import inspect
import re

import pytest

from hibernation.errors import HookError
from hibernation.hooks import HOOKS, check_hooks


def message(self, message, sender): ...


async def waiting(self, message, sender): ...


async def waiting_init(self, room): ...


def specs_of(**members):
    return check_hooks(type("Chat", (), members))


def refused(**members) -> HookError:
    with pytest.raises(HookError) as caught:
        specs_of(**members)
    return caught.value


# name, function, the parameters that it takes
CALLABLE = [
    ("on_start", lambda self: None, 0),
    ("on_message", message, 2),
    ("on_message", lambda self, message: None, 1),
    ("on_message", lambda self: None, 0),
    ("on_message", lambda self, text, who: None, 2),
    ("on_message", lambda self, text, connection: None, 2),
    ("on_message", lambda self, message, /, sender: None, 2),
    ("on_message", lambda self, *rest: None, 2),
    ("on_message", lambda *everything: None, 2),
    ("on_message", lambda self, message, *, loud=False: None, 1),
    ("on_message", lambda self, message, sender, more=None: None, 2),
    ("on_message", lambda self, message, sender=None, **rest: None, 2),
    ("on_close", lambda self, connection: None, 1),
    ("on_close", lambda self, connection, code, reason, was_clean: None, 4),
    ("on_error", lambda self, _connection, error: None, 2),
    ("on_fetch", staticmethod(lambda request, lobby: None), 2),
    ("on_fetch", staticmethod(lambda request: None), 1),
    ("on_fetch", staticmethod(lambda: None), 0),
    ("on_before_connect", staticmethod(lambda *both: None), 2),
    ("on_cron", staticmethod(lambda cron: None), 1),
]


@pytest.mark.parametrize(("name", "function", "count"), CALLABLE)
def test_trailing_parameters_may_be_left_off(name, function, count):
    spec = specs_of(**{name: function})[name]
    assert (spec.name, spec.parameters, spec.is_async) == (name, count, False)
    assert spec.is_static == isinstance(function, staticmethod)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=lambda hook: hook.name)
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
def test_the_line_that_help_shows_is_itself_accepted(hook, is_async):
    body = hook.line(is_async=is_async)
    namespace: dict[str, type] = {}
    exec("class Chat:\n" + "\n".join("    " + line for line in body.splitlines()), namespace)
    spec = check_hooks(namespace["Chat"])[hook.name]
    assert spec.parameters == len(hook.parameters)
    assert spec.is_async == is_async
    assert spec.is_static == hook.static


def test_a_class_without_hooks_has_none():
    assert specs_of(helper=lambda self: None, on_air=False, _on_private=message) == {}


def test_hooks_of_bases_and_mixins_count():
    class Base:
        async def on_start(self): ...
        def on_message(self, message): ...

    class Mixin:
        async def on_close(self, connection): ...

    class Chat(Mixin, Base):
        async def on_message(self, message, sender): ...  # type: ignore[override]

    specs = check_hooks(Chat)
    assert set(specs) == {"on_start", "on_message", "on_close"}
    assert specs["on_message"].parameters == 2
    assert specs["on_message"].is_async


def test_a_fault_in_a_mixin_is_found_and_the_mixin_named():
    class Mixin:
        def on_mesage(self, message): ...

    with pytest.raises(HookError, match=r"Mixin\.on_mesage") as caught:
        check_hooks(type("Chat", (Mixin,), {}))
    assert "nearest is on_message" in caught.value.problem


def test_a_decorator_that_keeps_the_signature_is_looked_through():
    @functools.wraps(waiting)
    def wrapped(*arguments):
        return waiting(*arguments)

    spec = specs_of(on_message=wrapped)["on_message"]
    assert spec.parameters == 2
    assert spec.is_async


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("on_mesage", "on_message"),
        ("on_massage", "on_message"),
        ("on_conect", "on_connect"),
        ("on_closed", "on_close"),
        ("on_errors", "on_error"),
        ("on_before_conect", "on_before_connect"),
        ("on_open", "on_connect"),
        ("on_disconnect", "on_close"),
        ("on_wake", "on_start"),
        ("onMessage", "on_message"),
        ("onBeforeConnect", "on_before_connect"),
        ("getConnectionTags", "get_connection_tags"),
        ("get_connection_tag", "get_connection_tags"),
        ("get_connections_tags", "get_connection_tags"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda f: f, staticmethod, classmethod], ids=["def", "static", "class"])
def test_a_misspelt_hook_is_named_with_the_nearest(name, nearest, wrap):
    error = refused(**{name: wrap(message)})
    assert error.hook == name
    assert error.problem == f"there is no such hook; the nearest is {nearest}"
    assert error.remedy.startswith(HOOKS[nearest].line())
    assert error.location == f"tests/hibernation/test_hooks.py:{inspect.getsourcelines(message)[1]}"


def test_names_that_begin_with_on_are_kept_for_hooks():
    error = refused(on_zzz=message)
    assert "kept for hooks" in error.problem
    assert "handle_zzz" in error.remedy


@pytest.mark.parametrize(
    "name", ["online", "get_connection", "one", "ontology", "handle_message", "_onMessage"]
)
def test_other_names_are_the_authors(name):
    assert specs_of(**{name: message}) == {}


# name, function, what the problem says
FAULTS = [
    (
        "on_message",
        lambda self, message, sender, extra: None,
        "wants 3 parameters, and is given 2 parameters",
    ),
    ("on_start", lambda self, room: None, "wants 1 parameter, and is given no parameters"),
    ("on_message", lambda self, message, *, sender: None, "`sender` can only be given by name"),
    ("on_message", lambda self, sender, message: None, "`sender` would be given the message"),
    ("on_message", lambda self, connection, message: None, "`connection` would be given the message"),
    ("on_message", lambda self, conn: None, "`conn` would be given the message"),
    ("on_error", lambda self, error: None, "`error` would be given the connection"),
    ("on_error", lambda self, exc: None, "`exc` would be given the connection"),
    ("on_close", lambda self, code, reason: None, "`code` would be given the connection"),
    ("on_close", lambda self, connection, reason: None, "`reason` would be given the code"),
    ("on_connect", lambda self, ctx: None, "`ctx` would be given the connection"),
    ("on_fetch", staticmethod(lambda lobby: None), "`lobby` would be given the request"),
    ("on_message", lambda message, sender: None, "self is missing"),
    ("on_start", lambda: None, "self is missing"),
    ("on_message", lambda: None, "self is missing"),
    ("on_message", staticmethod(lambda message, sender: None), "a method with self"),
    ("on_message", classmethod(message), "a method with self"),
    ("on_fetch", lambda request, lobby: None, "a static method"),
    ("on_fetch", classmethod(lambda cls, request, lobby: None), "a static method"),
    ("on_fetch", staticmethod(lambda self, request: None), "a static method has no self"),
    ("on_before_connect", staticmethod(lambda request, lobby, room: None), "wants 3 parameters"),
    ("on_message", None, "a hook is a function"),
    ("on_message", 3, "a hook is a function"),
    ("on_message", property(lambda self: message), "a hook is a function"),
    ("on_message", functools.partial(message, None), "a hook is a function"),
    ("on_message", int, "a hook is a function"),
]


@pytest.mark.parametrize(("name", "function", "problem"), FAULTS)
def test_a_hook_that_cannot_be_called_is_refused_with_the_line_to_write(name, function, problem):
    error = refused(**{name: function})
    assert error.owner == "Chat"
    assert error.hook == name
    assert problem in error.problem
    hook = HOOKS[name]
    assert error.remedy in (hook.line(), hook.line(is_async=False))
    assert f"{name}" in error.found


def test_a_hook_that_yields_is_refused():
    class Streams:
        async def on_request(self, request):
            yield b""

    def tags(self, connection):
        yield "a"

    assert "cannot yield" in refused(on_request=Streams.on_request).problem
    assert "cannot yield" in refused(get_connection_tags=tags).problem


@pytest.mark.parametrize(
    "init", [lambda self: None, lambda self, room, more: None, lambda self, *, room: None]
)
def test_a_constructor_takes_the_room_alone(init):
    """S3."""
    assert "with the room alone" in refused(__init__=init).problem


def test_a_constructor_cannot_wait():
    """S3: what waits is `on_start`."""
    error = refused(__init__=waiting_init)
    assert "cannot wait" in error.problem
    assert "on_start" in error.remedy


def test_a_constructor_may_have_defaults_of_its_own():
    assert specs_of(__init__=lambda self, room, size=3: None) == {}


def test_room_is_not_the_authors_name():
    assert "set by the broker" in refused(room=None).problem


def test_the_whole_text_reads_like_help():
    error = refused(on_before_request=message)
    place = f"tests/hibernation/test_hooks.py:{inspect.getsourcelines(message)[1]}"
    assert str(error).splitlines() == [
        f"Chat.on_before_request ({place}): it runs before there is a room, so it is a static method.",
        "  found: def on_before_request(self, message, sender)",
        "  write: @staticmethod",
        "         def on_before_request(request, lobby): ...",
    ]


def test_a_place_outside_the_working_folder_is_given_in_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert re.match(r"/.*test_hooks\.py:\d+$", refused(on_mesage=message).location)
