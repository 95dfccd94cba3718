"""The words of the link: what gateway and host say to each other, as CBOR arrays whose first item names the
kind.

Owns the numbers and the order of the fields; `hibernation.link` numbers and repeats messages,
`broker.gateway.links` and `hibernation.host` act on them. A connection is named by `slot, number`: the slot
finds the gateway's columns, the number, never used twice, proves that the slot still holds the same
connection.

Events, gateway to host (past facts):

| event | fields after the kind |
| --- | --- |
| CONNECT | key, slot, number, card, state, encoded request fields |
| MESSAGE | key, slot, number, card, state, end, data (str or bytes) |
| CLOSE | key, slot, number, card, state, code, reason, was clean, cause |
| REQUEST | key, request number, request fields |
| BEFORE | key, request number, encoded request fields: may this upgrade go on? |
| FETCH | "", request number, request fields: a request that belongs to no room |
| REPLY | query number, value |
| CREDIT | request number, chunks that may follow |
| CANCEL | request number: its client has left |
| ASK | question number, question, argument: for the admin commands |

Results, host to gateway (orders; released by the commit they depend on):

| result | fields after the kind |
| --- | --- |
| TURN | slot, number, end, effects: a message's turn has ended |
| CONNECTED | slot, number, failed, effects |
| CLOSED | slot, number, effects |
| EFFECTS | effects: of a turn that no connection caused |
| BEGUN | request number: its turn runs, so it is not asked again elsewhere |
| ADMIT | request number, 0, [], encoded request fields; or status, headers, body: the answer to BEFORE |
| CHUNK | request number, bytes |
| FINISH | request number, whole |
| QUERY | query number, key, what, argument |
| ANSWER | question number, value |
| RETIRE | this host starts no more turns: send nothing, wait for its end |
| ROW | shard, row number, encoded results: what one commit released, also kept on disk with it |
| SYNCED | token: all that ended before this link has been said |
| PAUSED | reason, or None: commits wait for the disk, or do no more |

A link begins with two maps: the host's, which says who it is, and the gateway's answer, `{"received": n,
"token": t}`, or `{"error": text}` if the host may not serve. The host says again what follows message `n`,
and what it has read from its shards' outboxes; then SYNCED with that token, which tells it from one that was
meant
for a former gateway. Until then the gateway sends no event.

A row's number is the shard's generation times 2**32 and a counter, so it never falls. A gateway carries out a
ROW only if its number is above all those of the shard that it has carried out.
| QUARANTINE | key, reason, since: the room does not start; None: it is tried again |

Effects, within a result:

| effect | fields after the kind |
| --- | --- |
| SEND | slot, number, frame |
| BROADCAST | key, frame, without (ids), all_of, any_of, none_of |
| SHUT | slot, number, code, reason |
| STATE | slot, number, CBOR or None |
| TAGS | slot, number, tags blob |
| AUTO | key, request, reply or None, prefix, rules that the room may have: an automatic response |
| RESPOND | request number, status, headers, body (None: chunks follow) |
"""

from hashlib import blake2b
from typing import Final

#: Version of this vocabulary; gateway and host must agree.
VERSION: Final = 3

CONNECT: Final = 1
MESSAGE: Final = 2
CLOSE: Final = 3
REQUEST: Final = 4
BEFORE: Final = 5
FETCH: Final = 6
REPLY: Final = 7
CREDIT: Final = 8
CANCEL: Final = 9
ASK: Final = 10

TURN: Final = 20
CONNECTED: Final = 21
CLOSED: Final = 22
EFFECTS: Final = 23
BEGUN: Final = 24
ADMIT: Final = 25
CHUNK: Final = 26
FINISH: Final = 27
QUERY: Final = 28
ANSWER: Final = 29
RETIRE: Final = 30
ROW: Final = 31
SYNCED: Final = 32
PAUSED: Final = 33
QUARANTINE: Final = 34

SEND: Final = 40
BROADCAST: Final = 41
SHUT: Final = 42
STATE: Final = 43
TAGS: Final = 44
RESPOND: Final = 45
AUTO: Final = 46

#: Partitions of all rooms, fixed for ever: shards and hosts are dealt out from them.
PARTITIONS: Final = 1024

_ID_END: Final = b"\xfe"
_TAG_END: Final = b"\xff"


def partition_of(key: str) -> int:
    """The partition, 0..1023, of the room with this key ("party/id")."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big") % PARTITIONS


def tags_blob(tags: tuple[str, ...] | list[str]) -> bytes:
    """Tags as one blob in which `tag_mark` finds a whole tag and nothing else: UTF-8 never holds 0xFE or
    0xFF.
    """
    if not tags:
        return b""
    return _TAG_END + _TAG_END.join([tag.encode() for tag in tags]) + _TAG_END


def tag_mark(tag: str) -> bytes:
    """What stands in a card exactly when its connection has `tag`."""
    return _TAG_END + tag.encode() + _TAG_END


def blob_tags(blob: bytes) -> tuple[str, ...]:
    """The tags of a blob made by `tags_blob`."""
    return tuple([part.decode() for part in blob[1:-1].split(_TAG_END)]) if blob else ()


def make_card(connection_id: str, uri: str, blob: bytes) -> bytes:
    """What a connection is, in one object: its id, its uri and its tags."""
    return connection_id.encode() + _ID_END + uri.encode() + _ID_END + blob


def read_card(card: bytes) -> tuple[str, str, bytes]:
    """Id, uri and tags blob of a card."""
    connection_id, uri, blob = card.split(_ID_END, 2)
    return connection_id.decode(), uri.decode(), blob


def card_tags(card: bytes) -> list[bytes]:
    """The tags of a card, as UTF-8."""
    blob = card[card.rindex(_ID_END) + 2 : -1]
    return blob.split(_TAG_END) if blob else []


def retag_card(card: bytes, blob: bytes) -> bytes:
    """The same card with other tags."""
    return card[: card.rindex(_ID_END) + 1] + blob
