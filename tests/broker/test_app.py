"""Loading an app: what is found, and what each thing that can go wrong says."""

import sys
from pathlib import Path

import pytest

import broker
from broker.app import app_folder, load_app, read_env
from hibernation.errors import AppError, HookError, SettingError

CHAT = "from broker import Server\nclass Chat(Server):\n    def on_message(self, message): ...\n"


@pytest.fixture(autouse=True)
def fresh_imports(tmp_path):
    """What a test has imported of its own, and its import path, go with it: apps of one name do not meet."""
    path = list(sys.path)
    yield
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(f"{tmp_path}/"):
            del sys.modules[name]


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / (name.replace("__in__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def refused(spec: str, folder: Path, kind: type[Exception] = AppError) -> AppError:
    with pytest.raises(kind) as caught:
        load_app(spec, search_path=folder)
    assert isinstance(caught.value, AppError | SettingError)
    return caught.value  # type: ignore[return-value]


@pytest.mark.parametrize(
    "spec", ["chatapp", "chatapp.py", "./chatapp.py", "chatapp:Chat", "chatapp.py:Chat", "{0}/chatapp.py"]
)
def test_an_app_is_a_module_or_a_file_with_or_without_a_class(spec, tmp_path):
    write(tmp_path, chatapp=CHAT)
    (party,) = load_app(spec.format(tmp_path), search_path=tmp_path)
    assert (party.name, party.aliases) == ("chat", ("main",))
    assert party.hooks == {"on_message"}
    assert party.cls.__module__ == "chatapp"
    assert app_folder(spec.format(tmp_path), search_path=tmp_path) == tmp_path


def test_every_server_defined_in_it_is_a_party_in_order(tmp_path):
    app = (
        "from broker import Server\nclass Main(Server): ...\nclass ChatRoom(Server): ...\nAlias = ChatRoom\n"
    )
    parties = load_app("rooms_app", search_path=write(tmp_path, rooms_app=app))
    assert [party.name for party in parties] == ["main", "chat-room"]


def test_bases_are_no_parties_where_they_come_from_elsewhere_or_are_private(tmp_path):
    base = "from broker import Server\nclass Base(Server):\n    async def on_start(self): ...\n"
    app = "from app_bases import Base\nclass _Own(Base): ...\nclass Chat(_Own): ...\n"
    (party,) = load_app("app_with_base", search_path=write(tmp_path, app_bases=base, app_with_base=app))
    assert party.name == "chat"
    assert party.has_on_start


def test_a_class_is_chosen_alone_wherever_it_comes_from(tmp_path):
    write(tmp_path, chatapp=CHAT + "class Game(Server): ...\n", other_app="from chatapp import Game\n")
    (party,) = load_app("chatapp:Game", search_path=tmp_path)
    assert (party.name, party.aliases) == ("game", ("main",))
    (party,) = load_app("other_app:Game", search_path=tmp_path)
    assert party.name == "game"


def test_the_folder_is_appended_so_that_it_shadows_nothing(tmp_path):
    app = "import helper_of_app, json\nassert json.dumps\n" + CHAT
    load_app(
        "chatapp.py", search_path=write(tmp_path, chatapp=app, helper_of_app="", json="raise 1", storage="")
    )
    assert sys.path[-1] == str(tmp_path)
    load_app("chatapp.py", search_path=tmp_path)
    assert sys.path.count(str(tmp_path)) == 1


def test_a_module_of_a_package_is_an_app(tmp_path):
    write(
        tmp_path, pack__in____init__="", pack__in__chatapp="from . import names\n" + CHAT, pack__in__names=""
    )
    (party,) = load_app("pack.chatapp", search_path=tmp_path)
    assert party.cls.__module__ == "pack.chatapp"
    assert sys.modules["pack"].chatapp is sys.modules["pack.chatapp"]


def test_the_same_app_can_be_loaded_after_a_change(tmp_path):
    write(tmp_path, chatapp=CHAT)
    assert load_app("chatapp.py", search_path=tmp_path)[0].name == "chat"
    write(tmp_path, chatapp=CHAT.replace("Chat", "Changed"))
    assert load_app("chatapp.py", search_path=tmp_path)[0].name == "changed"


# spec, files, what the text says
NOT_FOUND = [
    ("chat.py", {"chart": ""}, "there is no file {0}/chat.py; did you mean chart.py?"),
    ("chat.py", {"zzz": ""}, "there is no file {0}/chat.py; there are zzz.py"),
    ("sub/chat.py", {}, "there is no folder {0}/sub"),
    ("chatt_app", {"chat_app": ""}, 'there is no module "chatt_app" in {0}; did you mean chat_app?'),
    ("nowhere_at_all", {}, 'there is no module "nowhere_at_all" in {0}'),
    ("pack_app.chat", {"pack_app": ""}, 'there is no module "pack_app.chat"'),
    ("no_pack.chat", {}, 'there is no module "no_pack.chat"'),
    ("./sub_app/", {"sub_app__in__chat": ""}, "is a folder: name the file in it, such as ./sub_app/chat.py"),
    ("sub_app", {"sub_app__in__chat": ""}, '"sub_app" is a folder without __init__.py'),
    ("./chat.txt", {}, "is no Python file"),
    ("chat-app", {}, '"chat-app" is no module name'),
    ("chat:", {}, "names no class behind the colon"),
    ("chat:one two", {}, "names no class behind the colon"),
    (":Chat", {}, "names no app"),
    ("", {}, "names no app"),
    ("chatapp:Chatt", {"chatapp": CHAT}, "there is no class Chatt in chatapp.py; did you mean Chat?"),
    ("chatapp:size", {"chatapp": CHAT + "size = 1"}, "size in chatapp.py is not a subclass of broker.Server"),
    ("chatapp:Server", {"chatapp": CHAT}, "Server in chatapp.py is not a subclass"),
    ("empty_app.py", {"empty_app": ""}, "there is no Server in empty_app.py"),
    ("bare_app", {"bare_app": "from broker import Server"}, "class Chat(Server):"),
    (
        "re_app",
        {"chatapp": CHAT, "re_app": "from chatapp import Chat"},
        "no Server of its own; it imports Chat from chatapp: name that module, or re_app:Chat",
    ),
    (
        "two_app",
        {"two_app": CHAT + "class chat(Server): ...\n"},
        'two_app.py:2) and chat ({0}/two_app.py:4) would both be the party "chat": rename one of them',
    ),
    ("a.b.py", {"a.b": CHAT}, "take the dots out of it"),
]


@pytest.mark.parametrize(("spec", "files", "text"), NOT_FOUND, ids=[case[0] or "empty" for case in NOT_FOUND])
def test_an_app_that_is_not_there_is_told_what_is(spec, files, text, tmp_path):
    assert text.format(tmp_path) in str(refused(spec, write(tmp_path, **files)))


@pytest.mark.parametrize("name", ["broker", "hibernation", "storage"])
@pytest.mark.parametrize("spec", ["{}", "{}.py", "{}:Chat", "{}.rooms", "./{}", "./{}/", "sub/{}.py"])
def test_an_app_called_like_a_package_of_the_broker_is_refused_with_the_reason(name, spec, tmp_path):
    write(tmp_path, **{name: CHAT, f"{name}__in__rooms": CHAT, f"sub__in__{name}": CHAT})
    error = refused(spec.format(name), tmp_path)
    assert f'an app cannot be called "{name}"' in str(error)
    assert f"`import {name}` always means that one" in str(error)


@pytest.mark.parametrize("spec", ["json.py", "json", "sys.py", "trio.py", "trio"])
def test_an_app_that_python_would_not_find_first_is_refused(spec, tmp_path):
    write(tmp_path, **{spec.removesuffix(".py"): CHAT})
    kept = {name: sys.modules[name] for name in ("json", "sys", "trio") if name in sys.modules}
    with pytest.raises(AppError, match=r"has the name of another module.*, ?which Python finds first"):
        load_app(spec, search_path=tmp_path)
    assert {name: sys.modules[name] for name in kept} == kept


# text of the app, what the error says, what its details hold
BROKEN = [
    ("def f(:\n", "bad_app.py is not valid Python: ", "def f(:"),
    ("import no_such_thing\n", "imports no_such_thing, and there is no such module", "import no_such_thing"),
    ("def f():\n    return 1 / 0\nf()\n", "importing bad_app.py failed: ZeroDivisionError", "return 1 / 0"),
    ("import sys\nsys.exit(3)\n", "ends the process (sys.exit) while it is imported", "sys.exit(3)"),
    ("from . import x\n", "a file that is part of a package is named as a module", "from . import x"),
    ("from broker import Sever\n", "ImportError: cannot import name 'Sever'", "from broker import Sever"),
    ("raise BaseExceptionGroup('all', [ValueError(1)])\n", "ExceptionGroup", "raise BaseExceptionGroup"),
]


@pytest.mark.parametrize(("app", "text", "details"), BROKEN, ids=[case[1] for case in BROKEN])
def test_code_that_fails_is_shown_by_the_authors_frames_alone(app, text, details, tmp_path):
    error = refused("bad_app.py", write(tmp_path, bad_app=app))
    assert text in str(error)
    assert details in error.details
    assert f'File "{tmp_path}/bad_app.py", line' in error.details
    assert "importlib" not in error.details
    assert "broker/app.py" not in error.details
    assert "bad_app" not in sys.modules


def test_a_module_that_the_app_imports_is_shown_too(tmp_path):
    error = refused(
        "bad_app.py", write(tmp_path, bad_app="import inner_app\n", inner_app="\n\nraise ValueError(3)\n")
    )
    assert "bad_app.py failed: ValueError: 3" in str(error)
    assert f'{tmp_path}/bad_app.py", line 1' in error.details
    assert f'{tmp_path}/inner_app.py", line 3' in error.details
    assert "frozen" not in error.details


def test_an_interrupt_is_not_taken_for_a_fault_of_the_app(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        load_app("bad_app.py", search_path=write(tmp_path, bad_app="raise KeyboardInterrupt\n"))
    assert "bad_app" not in sys.modules


def test_a_wrong_hook_or_setting_comes_through_as_itself(tmp_path):
    write(tmp_path, bad_app=CHAT.replace("on_message", "on_mesage"), odd_app=CHAT + "    tags_max = -1\n")
    error = refused("bad_app.py", tmp_path, HookError)
    assert f"Chat.on_mesage ({tmp_path}/bad_app.py:3)" in str(error)
    assert f"Chat.tags_max ({tmp_path}/odd_app.py:4)" in str(refused("odd_app.py", tmp_path, SettingError))


def test_a_hook_added_after_the_class_was_made_is_checked_when_the_app_is_loaded(tmp_path):
    app = CHAT + "Chat.on_close = lambda self, code: None\n"
    assert "Chat.on_close" in str(refused("late_app.py", write(tmp_path, late_app=app), HookError))


# .env


def env(tmp_path: Path, text: str) -> dict[str, str]:
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    return read_env(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("\n  \n# A=1\n   # B=2\n", {}),
        ("A=1", {"A": "1"}),
        ("A=1\nB=2\r\nA=3\n", {"A": "3", "B": "2"}),
        ("  A = 1  ", {"A": "1"}),
        ("export A=1", {"A": "1"}),
        ("A=", {"A": ""}),
        ("A=#none", {"A": ""}),
        ("A=a#b", {"A": "a#b"}),
        ("A=a # b", {"A": "a"}),
        ("A=a=b==", {"A": "a=b=="}),
        ("A='a # b'", {"A": "a # b"}),
        ("A='a # b' # c", {"A": "a # b"}),
        ("A='a\\n'", {"A": "a\\n"}),
        ('A="a\\n\\t\\"\\\\ \\$ \\x"', {"A": 'a\n\t"\\ $ \\x'}),
        ('A="it\'s"', {"A": "it's"}),
        ("A=''", {"A": ""}),
        ("A=it's", {"A": "it's"}),
        ("A=$HOME ${HOME}", {"A": "$HOME ${HOME}"}),
        ("\ufeffA=ü", {"A": "ü"}),
        ("_a1=x", {"_a1": "x"}),
    ],
)
def test_a_line_of_env_is_read(text, values, tmp_path):
    assert env(tmp_path, text) == values


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("SECRET", "write NAME=VALUE"),
        ("1A=secret", "does not begin with a digit"),
        ("A-B=secret", "letters, digits and _ only"),
        ("=secret", "letters, digits and _ only"),
        ("A='secret", "the closing ' is missing"),
        ('A="secret\\"', 'the closing " is missing'),
        ("A='secret' secret", "text behind the closing quote"),
        ("A=secret\0", "cannot hold a NUL"),
    ],
)
def test_a_wrong_line_is_named_by_its_number_and_its_value_never_shown(line, text, tmp_path):
    """S39: a secret does not end up in a log."""
    with pytest.raises(AppError) as caught:
        env(tmp_path, f"GOOD=1\n\n{line}\n")
    assert str(caught.value).startswith(f"{tmp_path}/.env:3: ")
    assert text in str(caught.value)
    assert "secret" not in str(caught.value)


def test_variables_win_over_env_and_env_over_the_environment(tmp_path):
    (tmp_path / ".env").write_text("A=file\nB=file\n")
    environ = {"A": "process", "B": "process", "C": "process"}
    assert read_env(tmp_path, {"A": "flag"}, environ) == {"A": "flag", "B": "file", "C": "process"}
    assert environ["A"] == "process"


def test_no_env_file_is_no_error_and_an_unreadable_one_is(tmp_path):
    assert read_env(tmp_path, {}, {"A": "1"}) == {"A": "1"}
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    with pytest.raises(AppError, match=r"\.env cannot be read: it is not UTF-8"):
        read_env(tmp_path, {}, {})
    (tmp_path / ".env").unlink()
    (tmp_path / ".env").mkdir()
    with pytest.raises(AppError, match=r"\.env cannot be read: Is a directory"):
        read_env(tmp_path, {}, {})


def test_a_file_of_the_users_with_the_demos_name_is_in_nobodys_way(tmp_path, monkeypatch):
    """Whoever tries the README's chat.py in the folder of the checkout can still start the demo."""
    (tmp_path / "chat.py").write_text("raise RuntimeError('not this one')\n")
    monkeypatch.syspath_prepend(tmp_path)
    bundled = Path(broker.__file__).parent / "demo" / "chat.py"
    assert "main" in {name for party in load_app(str(bundled)) for name in (party.name, *party.aliases)}
