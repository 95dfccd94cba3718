"""What a gateway knows of a party: its hooks and its rooms' settings, as its hosts described them on the
link.

Owns `PartyView`. Runs no user code and imports none: a class never comes here, only its description
(`hibernation.party.Party.describe`).
"""

from dataclasses import dataclass, replace
from typing import Any

from broker.gateway.answers import Answers
from hibernation.auto_responses import Rule, from_plain
from hibernation.settings import Settings


@dataclass(frozen=True, slots=True, eq=False)
class PartyView:
    """One party. The booleans say which events its rooms want: others wake nobody."""

    name: str
    settings: Settings
    hibernate: bool
    overlaps: bool
    subprotocols: tuple[str, ...]
    cors: tuple[tuple[str, str], ...] | None
    wants_before_connect: bool
    wants_connect: bool
    wants_message: bool
    wants_close: bool
    wants_request: bool
    wants_fetch: bool
    streams_requests: bool
    message_bytes_max: int
    inflight_events_max: int
    inflight_bytes_max: int
    auto_responses: tuple[Rule, ...]
    answers: Answers | None

    @classmethod
    def from_description(cls, description: dict[str, Any], base: Settings) -> "PartyView":
        """Read what `Party.describe` made."""
        hooks = frozenset(description["hooks"])
        cors = description["cors"]
        settings = base.override(description["settings"])
        rules = from_plain(description.get("auto_responses", ()))
        return cls(
            name=description["name"],
            settings=settings,
            hibernate=description["hibernate"],
            overlaps=description.get("concurrency", "serial") != "serial",
            subprotocols=tuple(description["subprotocols"]),
            cors=None if cors is None else tuple((name, value) for name, value in cors),
            wants_before_connect="on_before_connect" in hooks,
            wants_connect=bool(hooks & {"get_connection_tags", "on_connect"}),
            wants_message="on_message" in hooks,
            wants_close="on_close" in hooks,
            wants_request="on_request" in hooks,
            wants_fetch="on_fetch" in hooks or description.get("static", False),
            streams_requests=description.get("stream_requests", False),
            message_bytes_max=settings.message_bytes_max,
            inflight_events_max=settings.room_inflight_events_max,
            inflight_bytes_max=settings.room_inflight_bytes_max,
            auto_responses=rules,
            answers=Answers(rules) if rules else None,
        )

    @classmethod
    def unknown(cls, name: str, settings: Settings) -> "PartyView":
        """A party of which only the name is known: nothing wakes its rooms."""
        return cls.from_description(
            {
                "name": name,
                "hooks": [],
                "cors": None,
                "settings": {},
                "hibernate": True,
                "subprotocols": [],
            },
            settings,
        )

    def without_hooks(self) -> "PartyView":
        """The same party once no host knows it any more: its connections stay, nothing wakes its rooms."""
        return replace(
            self,
            wants_before_connect=False,
            wants_connect=False,
            wants_message=False,
            wants_close=False,
            wants_request=False,
            wants_fetch=False,
            auto_responses=(),
            answers=None,
        )


def read_parties(descriptions: list[dict[str, Any]], base: Settings) -> dict[str, PartyView]:
    """All parties by every name under which they can be reached."""
    views = {}
    for description in descriptions:
        view = PartyView.from_description(description, base)
        for name in (view.name, *description["aliases"]):
            views[name] = view
    return views
