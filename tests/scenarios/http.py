"""HTTP: requests to rooms and to none, before-hooks, what a handler may return, one state with the sockets
(S1, S9, S26).
"""

import trio

from broker import Refuse, Response, Server
from tests.scenarios.driver import Stage


class Main(Server):
    @staticmethod
    async def on_fetch(request, lobby):
        if request.path == "/fails":
            raise KeyError("inner secret")
        return {"path": request.path, "query": request.args.to_dict(), "room": lobby.id}

    def on_message(self, message, sender):
        sender.send(message)


class Answering(Server):
    @staticmethod
    def on_before_request(request, lobby):
        if request.args.get("refuse"):
            raise Refuse(403, "not you")
        request.headers["X-Lobby"] = f"{lobby.party} {lobby.id}"

    async def on_request(self, request):
        if request.rest == "/text":
            return "hällo", 201, {"X-Room": "here"}
        if request.rest == "/json":
            return {"method": request.method, "rest": request.rest, "lobby": request.headers["X-Lobby"]}
        if request.rest == "/response":
            return Response(b"\x00\xff", status=404, content_type="application/octet-stream")
        if request.rest == "/echo":
            return await request.get_data()
        if request.rest == "/stream":
            return self.pieces(), {"Content-Type": "text/plain"}
        if request.rest == "/fails":
            self.room.storage.put("wrong", True)
            raise ValueError("inner secret")
        return str(await self.room.storage.get("wrong")), 200

    async def pieces(self):
        for number in range(3):
            await trio.sleep(0.01)
            yield f"piece {number} ".encode()


def scenario_a_handler_may_return_what_a_view_may(stage: Stage):  # S26
    answer = stage.request("GET", stage.path(Answering, rest="/text"))
    assert (answer.status, answer.text, answer.headers["x-room"]) == (201, "hällo", "here")
    answer = stage.request("PATCH", stage.path(Answering, rest="/json"), body=b"x")
    assert answer.json() == {"method": "PATCH", "rest": "/json", "lobby": f"answering {stage.room()}"}
    assert stage.request("GET", stage.path(Answering, rest="/response")).body == b"\x00\xff"
    body = bytes(range(256)) * 400
    assert stage.request("POST", stage.path(Answering, rest="/echo"), body=body).body == body


def scenario_an_answer_may_come_in_pieces(stage: Stage):  # S26
    answer = stage.request("GET", stage.path(Answering, rest="/stream"))
    assert answer.text == "piece 0 piece 1 piece 2 "
    assert stage.asleep(Answering) == 1


def scenario_a_before_hook_refuses_a_request(stage: Stage):  # S9
    assert stage.request("GET", stage.path(Answering) + "?refuse=1").status == 403
    assert stage.asleep(Answering) == 0


def scenario_a_request_that_fails_is_undone_and_tells_nothing(stage: Stage):  # S20, S39
    with stage.errors(ValueError):
        answer = stage.request("GET", stage.path(Answering, rest="/fails"))
    assert answer.status == 500
    assert b"secret" not in answer.body
    assert stage.request("GET", stage.path(Answering)).text == "None"


def scenario_addresses_of_no_room_are_the_main_partys(stage: Stage):  # S1
    assert stage.request("GET", "/some/where?a=ä".replace("ä", "%C3%A4")).json() == {
        "path": "/some/where",
        "query": {"a": "ä"},
        "room": None,
    }
    assert stage.request("GET", "/parties/nobody/room").status == 404
    assert stage.request("GET", stage.path(Main)).status == 404  # it has no on_request
    with stage.errors(KeyError):
        answer = stage.request("GET", "/fails")
    assert answer.status == 500


class Poll(Server):
    async def votes(self):
        return dict(await self.room.storage.list(prefix="vote:"))

    async def on_request(self, request):
        if request.method == "POST":
            vote = (await request.get_data()).decode()
            self.room.storage.put(f"vote:{vote}", 1 + await self.room.storage.get(f"vote:{vote}", 0))
            self.room.broadcast(await self.votes())
        return await self.votes()

    async def on_message(self, message, sender):
        self.room.storage.put(f"vote:{message}", 1 + await self.room.storage.get(f"vote:{message}", 0))
        self.room.broadcast(await self.votes())


def scenario_sockets_and_requests_see_one_room(stage: Stage):  # S26
    anna = stage.connect(Poll, "anna")
    anna.send("red")
    anna.expect({"vote:red": 1})
    assert stage.request("POST", stage.path(Poll), body=b"blue").json() == {"vote:red": 1, "vote:blue": 1}
    anna.expect({"vote:blue": 1, "vote:red": 1})
    assert stage.request("GET", stage.path(Poll)).json() == {"vote:red": 1, "vote:blue": 1}
