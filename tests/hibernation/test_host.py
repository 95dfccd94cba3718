"""The host as a whole, in the kit: what fetches from room to room meet when processes come and go (S30, S32,
S34).
"""

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
