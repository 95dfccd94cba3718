"""Rooms among rooms: what one asks of another, and sends to those who are with it (S30)."""

from broker import FetchCircle, LimitExceeded, Server, UnknownParty
from tests.scenarios.driver import Stage


class Asking(Server):
    """Does what it is told, with the room of the other party that has its own id and a suffix."""

    fetch_bytes_max = 2000

    def other(self, suffix, party="asked"):
        return self.room.parties[party].get(self.room.id + suffix)

    async def fetch(self, suffix, path, **options):
        answer = await self.other(suffix).fetch(path, **options)
        return [answer.status_code, await answer.get_data(as_text=True)]

    async def on_message(self, message, sender):
        verb, _, rest = message.partition(" ")
        try:
            if verb == "fetch":
                sender.send(
                    await self.fetch(
                        "-ü",
                        f"/{rest}",
                        method="POST",
                        query={"q": "ä&b"},
                        json={"a": 1},
                        headers={"X-A": "b"},
                    )
                )
            elif verb == "size":
                sender.send((await self.fetch("-ü", "/size", method="POST", data=b"x" * int(rest)))[0])
            elif verb == "write":
                sender.send(await self.fetch("-ü", f"/write/{rest}"))
                if rest == "fail":
                    self.other("-ü").broadcast("never seen")
                    raise ValueError("after the fetch")
            elif verb == "read":
                sender.send(await self.fetch("-ü", "/read"))
            elif verb == "tell":
                self.other("-ü").broadcast(rest, without=["bob"])
                self.other("-ü").broadcast({"to": "tagged"}, tag="t")
                sender.send("told")
            elif verb == "nobody":
                try:
                    self.other("", "no-such-party")
                except UnknownParty as error:
                    sender.send(["asked" in str(error), isinstance(error, KeyError)])
                sender.send((await self.other("", "unasked").fetch()).status_code)
            elif verb == "circle":
                sender.send(await self.fetch("-ü", f"/back/{self.room.id}"))
        except LimitExceeded:
            sender.send("too large")

    async def on_request(self, request):
        # "/back": the room that asks is asked, while its turn waits.
        return "never reached"

    def on_error(self, connection, error):
        connection.send(f"{type(error).__name__}")


class Asked(Server):
    @staticmethod
    def on_before_request(request, lobby):
        request.headers["X-Before"] = "came from outside"

    def get_connection_tags(self, connection, ctx):
        return ctx.request.args.getlist("tag")

    async def on_request(self, request):
        verb, _, rest = request.rest.removeprefix("/").partition("/")
        if verb == "write":
            self.room.storage.put("written", rest)
            self.room.broadcast(f"written {rest}")
            return rest, 201
        if verb == "read":
            return await self.room.storage.get("written", "nothing")
        if verb == "size":
            return str(len(await request.get_data()))
        if verb == "back":
            try:
                await self.room.parties["asking"].get(rest).fetch()
            except FetchCircle as error:
                return f"a circle: {self.room.key in str(error)} {f'asking/{rest}' in str(error)}", 409
        return {
            "method": request.method,
            "rest": request.rest,
            "q": request.args["q"],
            "json": await request.get_json(),
            "header": request.headers["X-A"],
            "before": request.headers.get("X-Before"),
            "caller": request.caller,
        }


class Unasked(Server):
    def on_message(self, message, sender): ...


def scenario_a_room_asks_another(stage: Stage):  # S30
    anna = stage.connect(Asking, "anna")
    anna.send("fetch über")
    status, text = anna.receive_json()
    assert status == 200
    stage.note("answer", text)
    assert '"caller": "asking/' in text.replace('":"', '": "')
    assert "came from outside" not in text
    stage.asleep(Asked, "ü")


def scenario_two_rooms_have_two_turns(stage: Stage):  # S30
    watcher = stage.connect(Asked, "watcher", room="ü")
    anna = stage.connect(Asking, "anna")
    with stage.errors(ValueError):
        anna.send("write fail")
        anna.expect("ValueError")
        watcher.expect("written fail")  # what the other has done stands
    anna.send("read")
    anna.expect([200, "fail"])


def scenario_a_room_sends_to_those_who_are_with_another_and_wakes_it_not(stage: Stage):  # S2, S30
    watcher = stage.connect(Asked, "watcher", room="ü", query="tag=t")
    bob = stage.connect(Asked, "bob", room="ü")
    woken = stage.asleep(Asked, "ü")
    anna = stage.connect(Asking, "anna")
    anna.send("tell ☃")
    anna.expect("told")
    watcher.expect("☃", {"to": "tagged"})
    bob.expect_nothing()
    assert stage.asleep(Asked, "ü") == woken


def scenario_who_is_not_there_is_told(stage: Stage):  # S30
    anna = stage.connect(Asking, "anna")
    anna.send("nobody")
    anna.expect([True, True], 404)


def scenario_rooms_that_would_wait_for_each_other_for_ever_are_told_so(stage: Stage):  # S30
    anna = stage.connect(Asking, "anna")
    anna.send("circle", "read")
    anna.expect([409, "a circle: True True"], [200, "nothing"])


def scenario_bounds_of_bodies_between_rooms(stage: Stage):  # S30
    anna = stage.connect(Asking, "anna")
    anna.send("size 1999", "size 2000", "size 2001")
    anna.expect(200, 200, "too large")


class Announced(Server):
    """Its before-hook asks a room whether somebody may come in, and tells those who are there."""

    @staticmethod
    async def on_before_connect(request, lobby):
        answer = await lobby.parties["asked"].get(lobby.id).fetch("/write/seen")
        lobby.parties[lobby.party].get(lobby.id).broadcast(f"{answer.status_code}: somebody comes")
        answer = await lobby.parties["announcer"].get(lobby.id).fetch()
        request.headers["X-Asked"] = await answer.get_data(as_text=True)

    def on_connect(self, connection, ctx):
        connection.send(ctx.request.headers["X-Asked"])


class Announcer(Server):
    def on_request(self, request):
        return f"{request.caller} asks"


def scenario_a_before_hook_asks_rooms_and_is_none(stage: Stage):  # S30
    anna = stage.connect(Announced, "anna")
    anna.expect("announced/ asks")
    bob = stage.connect(Announced, "bob")
    bob.expect("announced/ asks")
    anna.expect("201: somebody comes")
