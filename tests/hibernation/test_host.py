"""The host as a whole, in the kit: what fetches from room to room meet when processes come and go (S30, S32,
S34).
"""

from typing import Any

import trio

from broker import Server
from broker.testing import AsyncKit, virtual


@virtual
async def test_background_work_whose_fetch_waits_for_the_disk_gets_its_answer_from_the_next_gateway():
    answers = []

    class Main(Server):
        async def on_message(self, message):
            if message == "work":
                self.go = trio.Event()
                self.room.start_soon(self.work)
            else:
                self.room.storage.put("k", message)
                self.go.set()

        async def work(self):
            await self.go.wait()
            answer = await self.room.parties["main"].get("other").fetch()
            answers.append(await answer.get_data(as_text=True))

        def on_request(self, request):
            return "here"

    async with AsyncKit(Main) as kit:
        anna = await kit.connect("r", id="anna")
        anna.send("work")
        await kit.settle()
        commits = kit._machine.host._commits
        commits._ready = lambda _: kit.deaths > 0
        anna.send("write")
        await kit.settle()
        assert (kit.room("r").storage, kit.room("other").constructions) == ({}, 0)
        await kit.crash_gateway()
        await kit.advance(5)
        assert (answers, kit.room("r").storage) == (["here"], {"k": "write"})


@virtual
async def test_outside_of_a_turn_a_fetch_within_a_host_that_starts_no_more_turns_is_answered_at_once():
    begun = trio.Event()
    answers: list[Any] = []

    class Main(Server):
        @staticmethod
        async def on_fetch(request, lobby):
            pool = kit._machine.host._pool
            begun.set()
            while not pool.retiring:  # noqa: ASYNC110
                await trio.sleep(0.01)
            answer = await lobby.parties["main"].get("r").fetch()
            text = await answer.get_data(as_text=True)
            return [answer.status_code, answer.headers["retry-after"], text]

        def on_request(self, request):
            return "here"

    async def ask() -> None:
        answers.append((await kit.request("GET", "/page")).json())

    async with AsyncKit(Main) as kit:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await begun.wait()
            await kit.reload()
        assert answers == [[503, "1", "this host is being replaced\n"]]


@virtual
async def test_at_a_reload_rooms_go_on_until_the_crons_that_run_have_ended():
    """S31, S32: they may fetch from rooms."""
    log: list[Any] = []

    class Main(Server):
        crons = {"each": "* * * * *"}

        @staticmethod
        async def on_cron(cron, lobby):
            log.append("begun")
            await trio.sleep(2)
            log.append((await lobby.parties["main"].get("r").fetch()).status_code)

        def on_request(self, request):
            return "here"

    async with AsyncKit(Main) as kit:
        await kit.advance(61)
        assert log == ["begun"]
        before = kit._machine.host
        await kit.reload()
        await kit.wait(lambda: kit._machine.host is not before, 20)
        assert log == ["begun", 200]
