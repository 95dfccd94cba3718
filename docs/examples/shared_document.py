"""A shared document: a room for editors that use Yjs, with its own client y-websocket, unmodified.

    broker dev docs/examples/shared_document.py

The room never looks into the document. It keeps the updates as they come, hands them out in the same order,
and from time to time has an editor put them together.
"""

from broker import Connection, Server

SYNC, AWARENESS, QUERY_AWARENESS = b"\0", b"\1", b"\3"  # what a message is about
ASK, ANSWER, UPDATE = SYNC + b"\0", SYNC + b"\1", SYNC + b"\2"  # y-protocols: sync step 1, step 2, update

FROM_NOTHING = b"\0"  # the state of an empty document: whoever is asked from there answers with all they have
NO_CHANGE = b"\0\0"  # an update with nothing in it
PUT_TOGETHER = 500  # updates


class SharedDocument(Server):
    message_bytes_max = 2 * 1024 * 1024  # what one value in storage can hold

    def on_connect(self, connection: Connection) -> None:
        """Ask the newcomer what they have: they may have worked alone. And ask the others who they are."""
        self.ask(connection, stands_for=0)
        self.room.broadcast(QUERY_AWARENESS, without=[connection])

    async def on_message(self, message: str | bytes, sender: Connection) -> None:
        if not isinstance(message, bytes):
            sender.close(1003, "Yjs speaks in bytes")
        elif message.startswith(ASK):
            for update in (await self.room.storage.list(prefix="update ")).values():
                sender.send(UPDATE + field(update))
            sender.send(ANSWER + field(NO_CHANGE))  # that was all
            sender.add_tags("has everything")
        elif message.startswith(ANSWER):
            stands_for, *asked = sender.state or [0]
            sender.set_state(asked)
            await self.put_together(stands_for, read_field(message[2:]), sender)
        elif message.startswith(UPDATE):
            await self.add(read_field(message[2:]), sender)
        elif message.startswith(AWARENESS):  # names and cursors: passed on, never kept
            self.room.broadcast(message, without=[sender])

    async def add(self, update: bytes, sender: Connection) -> None:
        """Keep an update and pass it on, in one turn. After very many, have them put together."""
        number = await self.room.storage.get("updates", 0) + 1
        await self.room.storage.put({"updates": number, key(number): update})
        self.room.broadcast(UPDATE + field(update), without=[sender])
        if number % PUT_TOGETHER == 0 and "has everything" in sender.tags:
            self.ask(sender, stands_for=number)

    def ask(self, connection: Connection, stands_for: int) -> None:
        """Ask for a whole document, and note what the answer will stand for: all updates up to this number,
        which the connection has been sent before the question; 0 for none.
        """
        connection.set_state([*(connection.state or []), stands_for])
        connection.send(ASK + field(FROM_NOTHING))

    async def put_together(self, stands_for: int, document: bytes, sender: Connection) -> None:
        """Put a whole document in the place of the updates it is made of."""
        if stands_for:
            replaced = await self.room.storage.list(prefix="update ", end=key(stands_for + 1))
            await self.room.storage.delete(list(replaced))
            await self.room.storage.put(key(stands_for), document)
        elif document != NO_CHANGE:
            await self.add(document, sender)


def key(number: int) -> str:
    """Keys are listed in their order as text, so the numbers have one length."""
    return f"update {number:012}"


def field(data: bytes) -> bytes:
    """Bytes as lib0 writes them: the length first, in groups of seven bits, the lowest first."""
    head, length = bytearray(), len(data)
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*head, length]) + data


def read_field(data: bytes) -> bytes:
    """The bytes that `field` has written."""
    length = shift = position = 0
    while True:
        length |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if data[position - 1] < 0x80:
            break
    if len(data) != position + length:
        raise ValueError("a message is not as long as it says")
    return data[position:]
