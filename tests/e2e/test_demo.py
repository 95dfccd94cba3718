"""The chat of `broker demo`: in a real Chromium, as people use it, and at its socket, as nobody should."""

import contextlib
import functools
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.broker_process import DEADLINE_SECONDS, ROOT, BrokerProcess, eventually
from tests.e2e.browser import Browser, Tab
from tests.e2e.raw_client import TEXT, RawClient, encode_frame

pytestmark = pytest.mark.e2e

DEMO = ROOT / "broker" / "demo"

#: Makes the page write down what its strip says of the room: that it is awake may be over before we look.
REMEMBER_MOODS = """
    window.moods = [];
    new MutationObserver(() => moods.push(document.getElementById("mood").textContent))
        .observe(document.getElementById("mood"), {childList: true});
"""

_rooms = itertools.count(1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as running:
        yield running


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerProcess]:
    """`broker dev` on a copy of the demo, so that its code can be edited."""
    folder = tmp_path_factory.mktemp("demo")
    for path in DEMO.iterdir():
        if path.suffix in (".html", ".css", ".js", ".svg"):
            shutil.copy(path, folder)
    with BrokerProcess(folder, (DEMO / "chat.py").read_text(), command="dev") as process:
        yield process


@pytest.fixture
def room() -> str:
    """A room that no other test has been in."""
    return f"room-{next(_rooms)}"


def enter(browser: Browser, url: str, room: str, name: str, flag: str, **context: object) -> Tab:
    """A new tab in which somebody has come into a room."""
    tab = browser.open(f"{url}#{room}", {"name": name, "flag": flag}, **context)
    tab.wait_for("#status[data-state=open]")
    tab.wait_for("#log .line")
    return tab


def say(tab: Tab, text: str, only: str | None = None) -> None:
    tab.do("click", f'#choices label:has-text("{f"Only {only}" if only else "Everyone"}")')
    tab.do("fill", "#text", text)
    tab.do("press", "#text", "Enter")


def sees(tab: Tab, text: str) -> None:
    tab.wait_for(f"#log >> text={json.dumps(text)}")


def has_seen_it_awake(tab: Tab) -> bool:
    return "is awake" in tab.value("moods.splice(0)")


def assert_clean(*tabs: Tab, opened: int = 1) -> None:
    """Nothing went wrong in these tabs, nothing left the machine, and their sockets are the first ones."""
    for tab in tabs:
        assert tab.record() == {"opened": opened, "closed": opened - 1, "problems": [], "outside": []}
        assert tab.value("document.getElementById('socket').dataset.opened") == str(opened)


@contextlib.contextmanager
def demo_command(folder: Path) -> Iterator[str]:
    """`broker demo` itself; gives its address, and asserts that it stops well and leaves nothing."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    environ |= {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-P", "-m", "broker", "demo", "--port", "0"]
    process = subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = (re.match(r"ready on (http://\S+)", line) for line in process.stdout)
        ready = next(filter(None, lines))  # the end of its output, too, ends the wait
        yield f"{ready[1]}/"
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) == 0
        assert not list(folder.glob("broker-demo-*"))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(DEADLINE_SECONDS)
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_tabs_chat_while_their_room_sleeps_and_wakes(browser: Browser, tmp_path: Path) -> None:
    """S2, S6: and no socket notices."""
    with demo_command(tmp_path) as url:
        amber = enter(browser, url, "lobby", "Amber Fox", "fr")
        quiet = enter(browser, url, "lobby", "Quiet Otter", "jp")
        sees(amber, "Quiet Otter came in")
        assert amber.texts("#people-list bdi") == ["Amber Fox", "Quiet Otter"]
        assert amber.texts("#choices label") == ["Everyone", "Only France 1", "Only Japan 1"]
        for tab in (amber, quiet):
            tab.value(REMEMBER_MOODS)
        for turn in range(2):
            for tab in (amber, quiet):
                tab.wait_for("#strip[data-state=asleep] #mood:text('is asleep')")
                tab.wait_for("[data-figure=sockets]:text-is('2')")
                tab.wait_for("[data-figure=awake]:text-is('0')")
                tab.value("void moods.splice(0)")
            speaker, listener = (amber, quiet) if turn == 0 else (quiet, amber)
            say(speaker, f"message {turn}")
            sees(listener, f"message {turn}")
            for tab in (amber, quiet):
                eventually(functools.partial(has_seen_it_awake, tab), "sight of its waking")
            amber.wait_for(f"[data-figure=messages]:text-is('{turn + 1}')")
        for tab in (amber, quiet):
            tab.wait_for("#strip[data-state=asleep]")
            tab.wait_for("#socket:text('through ')")
        assert int(amber.texts("[data-figure=wakes]")[0]) >= 3
        assert len(amber.texts("#track b")) >= 3, "the wakings of the last minute, drawn apart"
        assert amber.texts("#log .message .text") == quiet.texts("#log .message .text")
        assert_clean(amber, quiet)
        amber.close()
        quiet.close()


def test_a_message_to_one_tag_reaches_only_those_who_have_it(
    browser: Browser, copy: BrokerProcess, room: str
) -> None:
    """S11."""
    url = copy.url()
    amber = enter(browser, url, room, "Amber Fox", "fr")
    quiet = enter(browser, url, room, "Quiet Otter", "jp")
    sunny = enter(browser, url, room, "Sunny Wren", "fr")
    sees(amber, "Sunny Wren came in")
    say(amber, "for France", only="France")
    sees(amber, "for France")
    say(quiet, "for France too", only="France")
    sees(amber, "for France too")
    say(amber, "for all")
    for tab in (amber, quiet, sunny):
        sees(tab, "for all")
    assert amber.texts(".text") == sunny.texts(".text") == ["for France", "for France too", "for all"]
    assert quiet.texts(".text") == ["for France too", "for all"]
    assert quiet.texts(".only") == ["Only to  France"]
    # What is kept follows the same rule: by the tag of the one who comes, not of the one who was there.
    late = enter(browser, url, room, "Merry Lynx", "jp")
    sees(late, "for all")
    assert late.texts(".text") == ["for all"]
    # A tag follows its person, and a chosen tag does not turn into everybody when its people have left.
    say(quiet, "for Japan", only="Japan")
    sees(late, "for Japan")
    late.do("click", "#people-list >> text=Change")
    late.do("fill", "#name", "Merry Panda")
    late.do("click", "#flags label:has-text('Peru')")
    late.do("click", "#profile >> text=Save")
    sees(quiet, "Merry Lynx is Merry Panda now")
    quiet.wait_for("#choices label:has-text('Only Japan 1')")
    say(amber, "for Peru", only="Peru")
    sees(late, "for Peru")
    assert "for Peru" not in quiet.texts(".text")
    late.close()
    sees(amber, "Merry Panda has left")
    eventually(lambda: amber.texts("#choices :checked + span") == ["Only Peru 0"], "nobody in Peru")
    assert_clean(amber, quiet, sunny)
    for tab in (amber, quiet, sunny):
        tab.close()


def test_new_code_drops_nobody(browser: Browser, copy: BrokerProcess, room: str) -> None:
    """S32: the same sockets, opened once each, before and after the room's code has changed."""
    amber = enter(browser, copy.url(), room, "Amber Fox", "fr")
    quiet = enter(browser, copy.url(), room, "Quiet Otter", "jp")
    sees(amber, "Quiet Otter came in")
    hosts = copy.host_pids()
    source = copy.app_file.read_text()
    assert source.count("came in") == 2  # once in the docstring, which suggests the change
    copy.write_app(source.replace("came in", "stepped through the door"))
    said = [f"while it changes {number}" for number in range(5)]
    for text in said:
        say(amber, text)

    def is_new() -> bool:
        with copy.connect(f"/party/{room}?name=Probe&flag=de"):
            return any("Probe stepped through the door" in line for line in quiet.texts("#log .line"))

    eventually(is_new, "line of the new code")
    assert copy.host_pids() != hosts
    sees(quiet, said[-1])
    say(quiet, "Still here, only to France", only="France")
    sees(amber, "Still here, only to France")
    say(amber, "And I")
    for tab in (amber, quiet):
        sees(tab, "And I")
    assert quiet.texts(".text") == amber.texts(".text") == [*said, "Still here, only to France", "And I"]
    amber.wait_for("#strip[data-state=asleep]")
    quiet.wait_for("#strip[data-state=asleep]")
    assert_clean(amber, quiet)
    amber.close()
    quiet.close()


def test_a_page_comes_back_by_itself(browser: Browser, copy: BrokerProcess, room: str) -> None:
    amber = enter(browser, copy.url(), room, "Amber Fox", "fr")
    say(amber, "before")
    sees(amber, "before")
    copy.stop()
    amber.wait_for("#status[data-state=waiting]")
    amber.do("fill", "#text", "not lost")
    amber.do("press", "#text", "Enter")
    amber.wait_for("#notice:text('Not connected')")
    assert amber.do("inputValue", "#text") == "not lost"
    copy.start()
    amber.wait_for("#status[data-state=open]")
    amber.wait_for("#strip[data-state=awake], #strip[data-state=asleep]")
    amber.do("press", "#text", "Enter")
    sees(amber, "not lost")
    assert amber.texts(".text") == ["before", "not lost"]
    assert amber.texts("#people-list bdi") == ["Amber Fox"]
    amber.close()


def test_rooms_are_apart_and_listed(browser: Browser, copy: BrokerProcess, room: str) -> None:
    amber = enter(browser, copy.url(), room, "Amber Fox", "fr")
    quiet = enter(browser, copy.url(), f"{room}-b", "Quiet Otter", "jp")
    amber.wait_for(f"#room-list a:has-text('{room}-b')")
    say(quiet, "only here")
    sees(quiet, "only here")
    amber.do("fill", "#new-room-name", f"{room} B")
    amber.do("press", "#new-room-name", "Enter")
    sees(amber, "only here")
    quiet.wait_for("#people-list >> text=Amber Fox")
    assert amber.texts("#room-list [aria-current] bdi") == [f"{room}-b"]
    assert amber.do("title") == f"{room}-b · Broker chat"
    amber.close()
    quiet.close()


def test_what_others_write_is_text_and_fits_a_narrow_screen(
    browser: Browser, copy: BrokerProcess, room: str
) -> None:
    name, text = "<b onmouseover=x()>", "<img src=x onerror=document.title='owned'>" + "w" * 300
    amber = enter(browser, copy.url(), room, name, "fr")
    small = enter(
        browser, copy.url(), room, "Small", "jp", viewport={"width": 360, "height": 640}, colorScheme="dark"
    )
    say(amber, text)
    small.wait_for("#log .text")
    assert small.texts(".text") == [text]
    assert small.texts(".head bdi") == [name]
    assert small.value("document.querySelectorAll('#log img, #log b').length") == 0
    assert small.value("document.documentElement.scrollWidth") == 360
    small.do("click", ".toggles >> text=People")
    small.wait_for("#people-list >> text=Only France")
    small.do("press", "body", "Escape")
    eventually(lambda: small.do("isVisible", "#people-list") is False, "the list to go")
    assert_clean(amber, small)
    amber.close()
    small.close()


# --- At the socket


def receive(client: RawClient, kind: str | None = None) -> dict[str, Any]:
    """The next event; the next of one kind, where others may come in between."""
    while True:
        opcode, payload = client.receive_frame()
        assert opcode == TEXT
        event: dict[str, Any] = json.loads(payload)
        if kind in (None, event["type"]):
            return event


NONSENSE: list[str | bytes] = [
    "",
    "hello",
    "[" * 5000,
    "1" * 5000,
    '{"say": 1, "to": null}',
    '{"say": "  ", "to": null}',
    '{"say": "no addressee"}',
    '{"name": "no flag"}',
    b"\xff\xfe",
    "null",
]


def test_nonsense_gets_a_notice_and_nobody_else_hears_of_it(copy: BrokerProcess, room: str) -> None:
    """S40."""
    with copy.connect(f"/party/{room}?name=Listener&flag=fr") as listener:
        assert receive(listener)["type"] == "welcome"
        for messages in (NONSENSE[:5], NONSENSE[5:]):
            with copy.connect(f"/party/{room}?flag=%3Cb%3E") as client:
                welcome = receive(client)
                assert welcome["people"][-1] == {"id": welcome["you"], "name": "Somebody", "flag": "un"}
                for message in messages:
                    client.send(message)
                    assert receive(client) == {
                        "type": "notice",
                        "line": "This chat does not know what that means.",
                    }
                client.send('{"say": "sense", "to": null}')
                assert receive(client)["text"] == "sense"
            kinds = [receive(listener)["type"] for _ in range(3)]
            assert kinds == ["joined", "said", "left"]
    assert not copy.log_events("turn failed")


def test_texts_are_bounded_and_made_valid(copy: BrokerProcess, room: str) -> None:
    long_name = "n" * 100
    with copy.connect(f"/party/{room}?name=%20{long_name}%20&flag=fr") as client:
        assert receive(client)["people"][0]["name"] == long_name[:24]
        client.send(json.dumps({"say": "x" * 2000, "to": None}))
        assert receive(client)["text"] == "x" * 1000
        client.send(r'{"say": "half a \ud83d pair", "to": null}')
        assert receive(client)["text"] == "half a ? pair"
        client.send(r'{"name": "\ud83d\n two  lines", "flag": "FR"}')
        assert receive(client)["person"] | {"id": ""} == {"id": "", "name": "? two lines", "flag": "un"}
        client.send("x" * 8192)
        assert receive(client)["type"] == "notice"
        client.send("x" * 8193)
        assert client.expect_close()[0] == 1009


def test_a_flood_is_turned_down(copy: BrokerProcess, room: str) -> None:
    with copy.connect(f"/party/{room}?name=Flood&flag=fr") as client:
        receive(client)
        # At once, so that they are as close to each other for the room.
        words = [json.dumps({"say": str(number), "to": None}) for number in range(12)]
        client.send_bytes(b"".join(encode_frame(TEXT, word.encode()) for word in words))
        kinds = [receive(client)["type"] for _ in range(12)]
        assert kinds == ["said"] * 8 + ["notice"] * 4


def test_many_who_come_at_once_are_all_welcome(copy: BrokerProcess, room: str) -> None:
    """S12: the list of one who comes in holds others whose first turn is still to come."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(RawClient(copy.port)) for _ in range(40)]
        for number, client in enumerate(clients):
            client.send_handshake(f"/party/{room}?name=N{number}&flag=fr")
        names = set()
        for client in clients:
            assert client.receive_answer().status == 101
            welcome = receive(client, "welcome")
            names |= {each["name"] for each in welcome["people"] if each["id"] == welcome["you"]}
        assert names == {f"N{number}" for number in range(40)}


def test_the_last_50_messages_are_kept(copy: BrokerProcess, room: str) -> None:
    for begin in range(0, 56, 8):
        with copy.connect(f"/party/{room}?name=N&flag=fr") as client:
            receive(client, "welcome")  # the one before may leave only now
            for number in range(begin, begin + 8):
                client.send(json.dumps({"say": str(number), "to": None}))
                assert receive(client, "said")["text"] == str(number)
    with copy.connect(f"/party/{room}?name=N&flag=fr") as client:
        kept = [said["text"] for said in receive(client, "welcome")["history"]]
    assert kept == [str(number) for number in range(6, 56)]


def test_the_page_comes_whole_and_guarded(copy: BrokerProcess) -> None:
    """S39."""
    with httpx.Client(base_url=copy.url()) as client:
        page = client.get("/")
        assert page.status_code == 200
        policy = page.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
        named = set(re.findall(r'(?:href|src)="(/[^"#]*)"', page.text)) - {"/"}
        for path in named | {"/socket.js", "/strip.js", "/flags.svg"}:
            assert client.get(path).status_code == 200, path
        assert client.head("/").status_code == 200
        for path in ("/chat.py", "/../chat.py", "/page.html", "/party/", "/%2e%2e/app.py"):
            assert client.get(path).status_code == 404, path
        refused = client.post("/", content=b"x")
        assert (refused.status_code, refused.text) == (405, "use GET\n")


def test_every_flag_is_drawn() -> None:
    listed = set(re.findall(r"\b([a-z]{2}): \"", (DEMO / "page.js").read_text()))
    drawn = set(re.findall(r'<symbol id="([a-z]{2})"', (DEMO / "flags.svg").read_text()))
    assert len(listed) > 10
    assert drawn == listed | {"un"}
