"""The kit that users test their rooms with (S43): what it shows, what it hides nothing of, what it says when
something is wrong.
"""

import gc
import os
import subprocess
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from broker import DeadLetter, Refuse, Server
from broker.testing import (
    AsyncKit,
    Closed,
    ConnectionOver,
    Expectation,
    HookFailed,
    Kit,
    NothingCame,
    Refused,
    virtual,
)
from storage import clock

#: Every point at which a gateway can be told to die while it carries out one turn with two effects.
GATEWAY_POINTS = ("before_effects", 0, 1, 2, "mid_frame", "after_effects")


class Counter(Server):
    async def on_start(self):
        self.count = await self.room.storage.get("count", 0)

    def on_message(self, message, sender):
        self.count += 1
        self.room.storage.put("count", self.count)
        self.room.broadcast(f"{self.count} {message}")
        sender.send("done")

    def on_request(self, request):
        return str(self.count)


class Forgetful(Server):
    """Keeps in a field what it should keep in its storage."""

    hibernate = False

    def __init__(self, room):
        self.said = []

    def on_message(self, message, sender):
        self.said.append(message)
        sender.send(" ".join(self.said))


class Failing(Server):
    def on_connect(self, connection, ctx):
        if ctx.request.args.get("fail"):
            raise LookupError("not this one")

    def on_message(self, message, sender):
        sender.send("never seen")
        raise ValueError(f"cannot read {message}")

    def on_request(self, request):
        raise KeyError("nothing")


class Slow(Server):
    hibernate = False
    idle_seconds = 10

    async def on_message(self, message, sender):
        await trio.sleep(float(message))
        sender.send(f"after {message}")


class Stamped(Server):
    def on_message(self, message, sender):
        sender.send(f"{time.monotonic() - FIRST:.0f} {time.time():.0f}")


class Main(Server):
    @staticmethod
    def on_before_connect(request, lobby):
        if "key" not in request.args:
            raise Refuse(403, "no key")

    @staticmethod
    def on_fetch(request, lobby):
        return "nobody's " + request.path

    def on_message(self, message, sender):
        sender.send(self.room.env["WHO"])


class SideRoom(Server):
    async def on_request(self, request):
        return {"room": self.room.id, "said": await request.get_json(), "by": request.headers["X-By"]}


# --- The simplest test ---------------------------------------------------------------------------------


def test_a_room_is_tested_in_five_lines():
    with Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("hello")
        anna.expect("1 hello", "done")


@virtual
async def test_the_same_on_trio():
    async with AsyncKit(Counter) as kit:
        anna = await kit.connect("room", id="anna")
        bob = await kit.connect("room", id="bob")
        anna.send("hello")
        await anna.expect("1 hello", "done")
        await bob.expect("1 hello")
        await bob.expect_nothing(1)
        assert (await kit.request("GET", kit.address("room"))).text == "1"


@virtual
async def test_a_test_on_trio_may_take_fixtures(tmp_path: Path):
    await trio.sleep(3600)  # its own sleep costs nothing either
    assert tmp_path.is_dir()


def test_a_room_sleeps_between_turns_and_looking_at_it_wakes_nothing():  # S2, S6
    with Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        assert kit.room("room").constructions == 0  # no hook for a connect
        anna.send("a")
        anna.send("b")
        view = kit.room("room")
        assert (view.awake, view.server, view.connections) == (False, None, ["anna"])
        assert view.storage == {"count": 2}
        assert view.constructions == 2
        assert kit.room("another").constructions == 0


def test_an_object_that_stays_can_be_looked_at_and_evicted():  # S6
    with Kit(Forgetful) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("a")
        anna.send("b")
        anna.expect("a", "a b")
        assert kit.room("room").server.said == ["a", "b"]
        assert kit.evict("room") is True
        assert kit.evict("room") is False
        anna.send("c")
        anna.expect("c")
        assert kit.room("room").constructions == 2


def test_hidden_state_shows_itself_when_each_turn_has_an_object_of_its_own():
    with Kit(Forgetful, evict_between_turns=True) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("a")
        anna.send("b")
        anna.expect("a", "b")
        assert kit.room("room").constructions == 2


def test_turns_of_one_burst_have_objects_of_their_own_too():
    async def main():
        async with AsyncKit(Forgetful, evict_between_turns=True) as kit:
            anna = await kit.connect("room")
            for letter in "abc":
                anna.send(letter)
            await anna.expect("a", "b", "c")
            assert kit.room("room").constructions == 3

    trio.run(main, clock=MockClock())


# --- What goes wrong is told ---------------------------------------------------------------------------


def test_an_error_in_a_hook_fails_the_test_with_its_traceback():
    with pytest.raises(
        HookFailed, match="failing/room: on_message failed: ValueError: cannot read x"
    ) as told:
        with Kit(Failing) as kit:
            anna = kit.connect("room", id="anna")
            anna.send("x")
    assert isinstance(told.value.__cause__, ValueError)
    assert told.value.errors == (told.value.__cause__,)
    assert "anna ▶ 'x'" in str(told.value)
    frames = traceback.extract_tb(told.value.__cause__.__traceback__)
    assert frames[-1].name == "on_message"


def test_an_error_that_comes_to_light_at_the_end_is_told_too():
    async def main():
        async with AsyncKit(Failing) as kit:
            anna = await kit.connect("room")
            anna.send("x")

    with pytest.raises(HookFailed, match="cannot read x"):
        trio.run(main, clock=MockClock())


def test_an_error_that_the_test_expects_does_not_fail_it():  # S20
    with Kit(Failing) as kit:
        anna = kit.connect("room", id="anna")
        with kit.expect_error(ValueError, match="cannot") as errors:
            anna.send("x")
        assert str(errors.only) == "cannot read x"
        anna.expect_nothing()  # the turn is undone, the socket stays
        with kit.expect_error(KeyError):
            assert kit.request("GET", "/party/room").status == 500
        with kit.expect_error(LookupError):
            bob = kit.connect("room", query={"fail": "1"})
        bob.expect_close(1011)


def test_only_the_error_that_is_expected_is_allowed():
    with pytest.raises(HookFailed, match="ValueError"), Kit(Failing) as kit:
        anna = kit.connect("room")
        with kit.expect_error(KeyError):
            anna.send("x")


def test_an_expected_error_that_does_not_come_fails_the_test():
    with pytest.raises(AssertionError, match="no hook has raised ValueError"), Kit(Counter) as kit:
        with kit.expect_error(ValueError):
            kit.settle()


def test_a_message_that_is_another_is_told_with_what_happened():
    with pytest.raises(Expectation, match="anna expects '2 a', and '1 a' came") as told:
        with Kit(Counter, seed=77) as kit:
            anna = kit.connect("room", id="anna")
            anna.send("a")
            anna.expect("2 a")
    assert "seed 77" in str(told.value)
    assert "anna ▶ 'a'" in str(told.value)


def test_waiting_for_what_does_not_come_ends_at_once_in_real_time():
    began = time.monotonic()
    with Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        with pytest.raises(NothingCame, match="none came within 30 s"):
            anna.receive(within=30)
        assert kit.elapsed == pytest.approx(30)
    assert time.monotonic() - began < 20


def test_a_failure_says_which_room_still_waits():
    with Kit(Slow) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("5")
        with pytest.raises(NothingCame, match="slow/room is still in on_message"):
            anna.expect("after 5")
        anna.expect("after 5", within=5)


def test_a_failed_assertion_of_the_test_shows_what_happened():
    with pytest.raises(AssertionError) as told, Kit(Counter, seed=78) as kit:
        kit.connect("room", id="anna")
        assert kit.room("room").awake
    [note] = told.value.__notes__
    assert "seed 78" in note
    assert "anna ▶ connects to counter/room" in note


def test_a_closed_connection_is_told():
    with Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        assert anna.close(4000, "bye") == Closed(4000, "bye", clean=True)
        for attempt in (lambda: anna.send("x"), anna.receive, lambda: anna.expect("x"), anna.expect_nothing):
            with pytest.raises(ConnectionOver, match="4000 bye") as told:
                attempt()
            assert (told.value.code, told.value.reason) == (4000, "bye")


def test_what_nobody_took_is_told_when_a_close_is_expected():
    with pytest.raises(Expectation, match="nobody took 'done'"), Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("x")
        anna.expect("1 x")
        anna.close()
        anna.expect_close()


def test_a_close_with_another_code_is_told():
    with pytest.raises(Expectation, match="expects to be closed with 1001, and it was with 1000"):
        with Kit(Counter) as kit:
            anna = kit.connect("room", id="anna")
            anna.close(1000)
            anna.expect_close(1001)


# --- Time ----------------------------------------------------------------------------------------------


def test_time_stands_still_until_a_test_lets_it_go_on():
    with Kit(Slow) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("3600")
        anna.expect_nothing(29.9)
        assert kit.elapsed == pytest.approx(29.9)
        with kit.expect_error(Exception, match="turn_timeout"):  # S20
            kit.advance(2)


def test_what_becomes_due_happens_in_order_and_at_its_time():
    async def main():
        async with AsyncKit(Slow) as kit:
            seen = []

            async def listen(client, name):
                await client.receive(within=20)
                seen.append((name, round(kit.elapsed)))

            clients = {name: await kit.connect(name) for name in ("5", "2", "9")}
            for name, client in clients.items():
                client.send(name)
            await kit.advance(20)
            assert [len(client.received) for client in clients.values()] == [1, 1, 1]
            lines = [line.split()[0] for line in kit.transcript.splitlines() if "◀" in line]
            assert lines == ["2.000", "5.000", "9.000"]

    trio.run(main, clock=MockClock())


def test_a_room_that_stays_goes_when_its_time_is_over():  # S6
    with Kit(Slow) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("0")
        anna.expect("after 0")
        kit.advance(600)
        assert kit.room("room").awake
        anna.close()
        kit.advance(9)
        assert kit.room("room").awake
        kit.advance(3)
        assert not kit.room("room").awake


def test_a_client_that_answers_no_ping_is_given_up():  # S15
    with Kit(Slow, ping_interval_seconds=25, ping_timeout_seconds=20) as kit:
        anna = kit.connect("room", id="anna")
        bob = kit.connect("room", id="bob")
        anna.stop_reading()
        kit.advance(40)
        assert kit.room("room").connections == ["anna", "bob"]
        kit.advance(20)
        assert kit.room("room").connections == ["bob"]
        anna.read_on()
        assert anna.expect_close().code == 1006
        bob.expect_nothing()


FIRST = 0.0


def test_the_apps_module_follows_the_virtual_clock():
    global FIRST
    real = time
    with Kit(Stamped, start=datetime(2031, 5, 1, tzinfo=UTC)) as kit:
        assert time is not real
        FIRST = time.monotonic()
        anna = kit.connect("room")
        kit.advance(90)
        anna.send("?")
        anna.expect(f"90 {datetime(2031, 5, 1, 0, 1, 30, tzinfo=UTC).timestamp():.0f}")
        assert kit.now() == datetime(2031, 5, 1, 0, 1, 30, tzinfo=UTC).timestamp()
    assert time is real


def test_the_clock_is_the_real_one_again_afterwards_and_one_kit_has_it_at_a_time():
    with Kit(Counter, follow_time=False):
        assert clock.monotonic is not time.monotonic
        with pytest.raises(RuntimeError, match="the clock of this process is replaced already"), Kit(Counter):
            pass
    assert (clock.monotonic, clock.now) == (time.monotonic, time.time)
    import broker.gateway.hub
    import hibernation.pool

    assert vars(hibernation.pool)["monotonic"] is vars(broker.gateway.hub)["monotonic"] is time.monotonic


def test_an_async_kit_needs_a_virtual_clock():
    async def main():
        async with AsyncKit(Counter):
            pass

    with pytest.raises(RuntimeError, match="needs a virtual clock: decorate the test with"):
        trio.run(main)


def test_a_start_without_a_zone_is_refused():
    with pytest.raises(ValueError, match="without a zone"):
        Kit(Counter, start=datetime(2031, 5, 1))


# --- Deaths --------------------------------------------------------------------------------------------


DEATHS = [
    *(("gateway", at) for at in (None, *GATEWAY_POINTS)),
    *(("host", at) for at in (None, "before_commit", "after_commit")),
]


@pytest.mark.parametrize(("who", "at"), DEATHS)
def test_no_death_loses_or_doubles_anything(who, at):  # S22, S34
    with Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        bob = kit.connect("room", id="bob")
        anna.send("a")
        getattr(kit, f"crash_{who}")(at=at)
        anna.send("b")
        anna.send("c")
        kit.advance(1)
        assert kit.deaths == 1
        anna.expect("1 a", "done", "2 b", "done", "3 c", "done")
        bob.expect("1 a", "2 b", "3 c")
        anna.expect_nothing(5)
        bob.expect_nothing(5)
        assert kit.room("room").storage == {"count": 3}
        assert anna.close() == Closed(1000, "", clean=True)


def test_both_die_one_after_the_other():
    with Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        for number in range(1, 6):
            kit.crash_host(at="after_commit")
            kit.crash_gateway(at=1)
            anna.send("x")
            anna.expect(f"{number} x", "done", within=10)
        anna.expect_nothing(5)
        assert kit.deaths == 10


def test_a_turn_that_its_host_does_not_survive_is_run_again():  # S23
    with Kit(Slow) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("5")
        kit.crash_host()
        anna.expect("after 5", within=10)
        assert kit.room("room").constructions == 2


def test_a_message_that_always_meets_a_death_is_a_dead_letter():  # S23
    with Kit(Slow) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("5")
        with kit.expect_error(DeadLetter) as errors:
            for _ in range(3):
                kit.crash_host()
                kit.advance(1)
        assert "3 times" in str(errors.only)
        anna.send("1")
        anna.expect("after 1", within=10)


def test_an_unknown_point_is_refused():
    with Kit(Counter) as kit:
        with pytest.raises(ValueError, match="before_commit"):
            kit.crash_host(at="sometime")
        with pytest.raises(ValueError, match="mid_frame"):
            kit.crash_gateway(at="sometime")


# --- Doors ---------------------------------------------------------------------------------------------


def test_an_upgrade_may_be_refused():  # S9
    with Kit(Main, SideRoom, env={"WHO": "you"}) as kit:
        with pytest.raises(Refused, match="no key") as told:
            kit.connect("room")
        assert (told.value.status, told.value.response.text) == (403, "no key\n")
        anna = kit.connect("room", query={"key": "1"})
        anna.send("who")
        anna.expect("you")


def test_requests_reach_rooms_and_what_is_none():  # S26
    with Kit(Main, SideRoom) as kit:
        address = kit.address("ä b/c", party="side-room", path="/below")
        answer = kit.request("POST", address, json=["hello"], headers={"X-By": "me"})
        assert answer.json() == {"room": "ä b/c", "said": ["hello"], "by": "me"}
        assert answer.headers["content-type"] == "application/json"
        assert kit.request("GET", "/elsewhere", query={"a": "b"}).text == "nobody's /elsewhere"
        with pytest.raises(ValueError, match='no party "side"; there are main, side-room'):
            kit.connect("room", party="side")


def test_an_app_may_be_a_file(tmp_path: Path):
    (tmp_path / "kit_app.py").write_text(
        "from broker import Server\n"
        "class Echo(Server):\n"
        "    def on_message(self, message, sender):\n"
        "        sender.send(message + self.room.env['MARK'])\n"
    )
    (tmp_path / ".env").write_text("MARK=!\n")
    with Kit(tmp_path / "kit_app.py") as kit:
        anna = kit.connect("room")
        anna.send("hello")
        anna.expect("hello!")


def test_an_app_is_classes_or_one_name():
    for app in ((), ("a.py", "b.py"), (Counter, "a.py")):
        with pytest.raises(TypeError, match="takes Server subclasses, or one"):
            Kit(*app)


class Mirror(Server):
    message_bytes_max = 2 * 1024 * 1024
    outbox_bytes_max = 8 * 1024 * 1024
    subprotocols = ("b", "a")

    def on_message(self, message, sender):
        sender.send(message)


@pytest.mark.parametrize("size", [0, 125, 65536, 96 * 1024, 96 * 1024 + 1, 2 * 1024 * 1024])
def test_messages_of_any_size_pass(size):
    with Kit(Mirror) as kit:
        anna = kit.connect("room")
        for message in ("ä" * (size // 2), b"\0" * size):
            anna.send(message)
            anna.expect(message)


def test_a_message_over_the_limit_closes():  # S24
    with Kit(Mirror) as kit:
        anna = kit.connect("room")
        anna.send(b"\0" * (2 * 1024 * 1024 + 1))
        anna.expect_close(1009)


def test_json_is_sent_and_compared():
    with Kit(Mirror) as kit:
        anna = kit.connect("room", subprotocols=["a", "b"])
        assert anna.subprotocol == "b"  # S17
        anna.send({"a": [1, None]})
        anna.send([2])
        anna.expect({"a": [1, None]})
        assert anna.receive_json() == [2]


# --- Chance --------------------------------------------------------------------------------------------


class Dice(Server):
    def on_message(self, message, sender):
        import random

        sender.send(str(random.random()))


def test_a_seed_decides_what_is_free():
    def throw(seed):
        with Kit(Dice, seed=seed) as kit:
            anna = kit.connect("room")
            anna.send("throw")
            return anna.receive()

    assert throw(1) == throw(1) != throw(2)


# --- Its own manners -----------------------------------------------------------------------------------


def test_it_is_not_imported_with_the_broker():
    code = "import broker, sys; assert not any(name.startswith('broker.testing') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_nothing_is_left_behind():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def run():
        with Kit(Counter) as kit:
            anna = kit.connect("room")
            kit.connect("room")
            kit.crash_gateway()
            kit.crash_host()
            anna.send("a")
            anna.expect("1 a", "done")
        assert not kit._kit._machine.data.exists()

    run()
    gc.collect()
    before = descriptors()
    for _ in range(3):
        run()
    gc.collect()
    assert descriptors() <= before


# --- New code ------------------------------------------------------------------------------------------


def version(text):
    class Versioned(Server):
        async def on_message(self, message, sender):
            await trio.sleep(float(message))
            self.room.storage.put("by", text)
            sender.send(text)

    return Versioned


def test_new_code_takes_over_when_the_turns_of_the_old_have_ended():  # S32
    with Kit(version("old")) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("5")
        anna.send("0")
        kit.reload(version("new"))
        anna.expect("old", "new")
        assert kit.deaths == 0
        assert kit.elapsed == pytest.approx(5, abs=0.5)
        kit.reload()
        anna.send("0")
        anna.expect("new")
        assert kit.room("room").storage == {"by": "new"}


def test_a_turn_that_takes_longer_than_drain_is_run_again_by_the_new_code():  # S32
    with Kit(version("old"), drain=2) as kit:
        anna = kit.connect("room", id="anna")
        anna.send("5")
        kit.reload(version("new"))
        anna.expect("new", within=10)
        anna.expect_nothing(10)


def test_a_death_that_was_ordered_and_did_not_come_fails_the_test():
    for order in ({"at": 3}, {"at": "mid_frame"}):
        with pytest.raises(AssertionError, match=f"nothing has come to the point {order['at']!r}"):
            with Kit(Counter) as kit:
                kit.crash_gateway(**order)
    with pytest.raises(AssertionError, match="nothing has come to the point 'after_commit'"):
        with Kit(Counter) as kit:
            kit.crash_host(at="after_commit")


def test_a_fault_below_the_kit_is_raised_as_it_is(monkeypatch):
    with pytest.raises(Exception) as told, Kit(Counter) as kit:
        anna = kit.connect("room", id="anna")
        monkeypatch.setattr(kit._kit._machine.host._pool, "_flush", lambda: 1 / 0)
        anna.send("x")
    assert isinstance(told.value, ExceptionGroup)
    assert told.value.split(ZeroDivisionError)[0] is not None
