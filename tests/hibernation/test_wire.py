"""Cards, tags and partitions: what gateway and host must read alike."""

from hypothesis import given
from hypothesis import strategies as st

from hibernation import wire

texts = st.text(min_size=1, max_size=8)
tag_lists = st.lists(texts, max_size=6, unique=True)


def test_every_word_has_a_number_of_its_own():
    """One byte of CBOR tells what an item is."""
    names = [name for name, value in vars(wire).items() if name.isupper() and isinstance(value, int)]
    words = [name for name in names if name not in ("VERSION", "PARTITIONS")]
    assert len({getattr(wire, name) for name in words}) == len(words)
    # The host tells events of a room's connections by this.
    assert max(wire.CONNECT, wire.MESSAGE, wire.CLOSE) == wire.CLOSE < wire.REQUEST


@given(texts, texts, tag_lists)
def test_a_card_gives_back_what_it_was_made_of(connection_id, uri, tags):
    """Whatever characters they hold: 0xFE and 0xFF occur in no UTF-8."""
    card = wire.make_card(connection_id, uri, wire.tags_blob(tags))
    assert wire.read_card(card)[:2] == (connection_id, uri)
    assert wire.blob_tags(wire.read_card(card)[2]) == tuple(tags)


@given(texts, texts, tag_lists, tag_lists)
def test_a_card_with_other_tags_is_otherwise_the_same(connection_id, uri, before, after):
    """S11."""
    card = wire.make_card(connection_id, uri, wire.tags_blob(before))
    assert wire.retag_card(card, wire.tags_blob(after)) == wire.make_card(
        connection_id, uri, wire.tags_blob(after)
    )


@given(texts, texts, tag_lists, texts)
def test_a_tag_is_found_exactly_when_it_is_there(connection_id, uri, tags, wanted):
    """S12: whole tags, never a part of one, of the id or of the uri."""
    card = wire.make_card(connection_id, uri, wire.tags_blob(tags))
    assert (wire.tag_mark(wanted) in card) == (wanted in tags)


@given(st.text(max_size=20))
def test_partitions_are_within_their_bounds(key):
    """Every room has one."""
    assert 0 <= wire.partition_of(key) < wire.PARTITIONS


def test_partitions_never_change():
    """Rooms are on disk under them: these numbers are for ever."""
    known = {"main/a": 178, "chat/lobby": 547, "chat/é/x": 581, "": 692}
    assert {key: wire.partition_of(key) for key in known} == known
    assert len({wire.partition_of(f"main/{number}") for number in range(20_000)}) == wire.PARTITIONS
