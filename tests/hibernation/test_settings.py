"""The table of settings: its defaults, its bounds, its sources, its texts."""

import dataclasses
import json
import re

import pytest

from hibernation.errors import SettingError
from hibernation.settings import ROOM_SETTINGS, SETTINGS, Settings

KIB, MIB = 1024, 1024 * 1024

# Written out again from the rules, so that a default changes in two places or not at all.
DEFAULTS = {
    "start_timeout": 30,  # S3
    "idle_seconds": None,  # S6: 0, or 10 where hibernate is False
    "duplicate_ids": "probe",  # S10
    "probe_seconds": 2,
    "tags_max": 64,  # S11
    "tag_bytes_max": 256,
    "state_bytes_max": 16 * KIB,  # S13
    "close_timeout_seconds": 5,  # S14
    "ping_interval_seconds": 25,  # S15
    "ping_timeout_seconds": 20,
    "turn_timeout": 30,  # S20
    "turn_bytes_max": 16 * MIB,
    "sql_timeout": 2,  # S28
    "room_database_bytes_max": 1024 * MIB,
    "durability": "full",  # S21
    "connection_inflight_bytes_max": 64 * KIB,  # S24
    "room_inflight_events_max": 256,
    "room_inflight_bytes_max": 4 * MIB,
    "link_inflight_bytes_max": 64 * MIB,
    "turns_per_room_burst": 64,
    "message_bytes_max": MIB,
    "spill_bytes_max": 1024 * MIB,
    "inbox_bytes_max": 96 * KIB,
    "receive_buffer_bytes": 128 * KIB,
    "outbox_bytes_max": MIB,  # S25
    "send_buffer_bytes": 64 * KIB,
    "outbox_total_bytes_max": 256 * MIB,
    "slow_consumer": "close",
    "request_bytes_max": 16 * MIB,  # S26
    "request_memory_bytes": MIB,  # S26
    "fetch_timeout": 20,  # S30
    "fetch_bytes_max": MIB,
    "drain": 30,  # S32
    "handshake_timeout_seconds": 10,  # S37
    "head_bytes_max": 16 * KIB,
    "room_connections_max": 32_768,
    "origins": None,  # S38
}
NUMBERS = [setting for setting in SETTINGS if setting.kind in ("int", "float")]


@pytest.mark.parametrize(("name", "value"), DEFAULTS.items(), ids=str)
def test_a_default_is_the_one_in_brackets(name, value):
    assert getattr(Settings(), name) == value


def test_a_message_may_be_raised_to_32_mib_and_no_further():
    """S24."""
    assert Settings(message_bytes_max=32 * MIB).message_bytes_max == 32 * MIB
    with pytest.raises(SettingError, match="32 MiB"):
        Settings(message_bytes_max=32 * MIB + 1)


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda s: s.name)
def test_a_number_may_stand_at_its_bounds_and_not_beyond(setting):
    step = 1 if setting.kind == "int" else 0.001
    for bound in (setting.minimum, setting.maximum):
        assert setting.check(bound, "here") == bound
    for outside in (setting.minimum - step, setting.maximum + step):
        with pytest.raises(SettingError) as caught:
            setting.check(outside, "here")
        assert caught.value.source == "here"
        assert caught.value.given == outside
        assert setting.allowed_text in str(caught.value)


@pytest.mark.parametrize("setting", NUMBERS, ids=lambda s: s.name)
@pytest.mark.parametrize("value", [True, "1", float("nan"), float("inf"), [1]], ids=repr)
def test_a_number_is_nothing_else(setting, value):
    with pytest.raises(SettingError):
        setting.check(value, "here")


@pytest.mark.parametrize("setting", [s for s in NUMBERS if s.kind == "int"], ids=lambda s: s.name)
def test_a_count_has_no_fraction(setting):
    with pytest.raises(SettingError, match="whole number"):
        setting.check(float(setting.minimum), "here")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_every_line_of_the_table_can_be_shown_to_people(setting):
    assert setting.doc.endswith(".")
    assert setting.rules
    assert all(re.fullmatch(r"S\d+", rule) for rule in setting.rules)
    assert setting.default_text
    assert setting.allowed_text
    assert setting.option == "--" + setting.name.replace("_", "-")
    assert setting.variable == "BROKER_" + setting.name.upper()
    if setting.default is None:
        assert setting.none_means


def test_the_texts_have_units():
    table = {setting.name: setting for setting in SETTINGS}
    assert table["message_bytes_max"].default_text == "1 MiB"
    assert table["message_bytes_max"].allowed_text == "a whole number of bytes from 1 byte to 32 MiB"
    assert table["turn_timeout"].default_text == "30 seconds"
    assert table["room_connections_max"].default_text == "32,768"
    assert table["trusted_proxies"].default_text == "empty"
    assert table["origins"].default_text == "none: the same host and port only"
    assert table["durability"].allowed_text == '"full" or "os"'


def test_flags_win_over_variables_and_variables_over_defaults():
    settings = Settings.from_sources(
        {"turn_timeout": "1.5", "durability": None, "tags_max": 3},
        {"BROKER_TURN_TIMEOUT": "9", "BROKER_DURABILITY": "os", "HOME": "/root", "BROKER_PROBE_SECONDS": ""},
    )
    assert settings.turn_timeout == 1.5
    assert settings.durability == "os"
    assert settings.tags_max == 3
    assert settings == Settings(turn_timeout=1.5, durability="os", tags_max=3)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("message_bytes_max", "65536", 65536),
        ("message_bytes_max", "64KiB", 65536),
        ("message_bytes_max", " 64 kib ", 65536),
        ("message_bytes_max", "64k", 65536),
        ("message_bytes_max", "2MiB", 2 * MIB),
        ("spill_bytes_max", "2GiB", 2048 * MIB),
        ("message_bytes_max", "100B", 100),
        ("idle_seconds", "0.5", 0.5),
        ("idle_seconds", "none", None),
        ("connections_max", "none", None),
        ("connections_max", "15000", 15000),
        ("origins", "*", "*"),
        ("origins", "none", None),
        (
            "origins",
            "https://a.example, http://b.example:8080",
            ("https://a.example", "http://b.example:8080"),
        ),
        ("origins", "https://A.Example:443/,http://b.example:80", ("https://a.example", "http://b.example")),
        ("origins", "http://[::1]:3000,null", ("http://[::1]:3000", "null")),
        ("trusted_proxies", "10.0.0.0/8,::1", ("10.0.0.0/8", "::1/128")),
        ("trusted_proxies", ",", ()),
    ],
)
def test_text_is_read(name, text, value):
    assert getattr(Settings.from_sources({name: text}, {}), name) == value
    assert getattr(Settings.from_sources({}, {"BROKER_" + name.upper(): text}), name) == value


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("message_bytes_max", "64KB!"),
        ("message_bytes_max", "KiB"),
        ("message_bytes_max", "1.5MiB"),
        ("message_bytes_max", "64kk"),
        ("message_bytes_max", "none"),
        ("idle_seconds", "10s"),
        ("idle_seconds", "nan"),
        ("durability", "FULL"),
        ("slow_consumer", "drop"),
        ("origins", "a.example"),
        ("origins", "https://a.example/path"),
        ("origins", "https://*.example"),
        ("origins", "https://user@a.example"),
        ("origins", "https://a.example:port"),
        ("origins", "*,https://a.example"),
        ("origins", "https://"),
        ("trusted_proxies", "10.0.0.1/8"),
        ("trusted_proxies", "localhost"),
    ],
)
def test_wrong_text_is_refused_by_the_name_under_which_it_was_given(name, text):
    """S38 for origins: a list of exact ones; nothing that looks like a pattern is taken for one."""
    option = "--" + name.replace("_", "-")
    with pytest.raises(SettingError) as caught:
        Settings.from_sources({name: text}, {})
    assert str(caught.value).startswith(option + ": ")
    variable = "BROKER_" + name.upper()
    with pytest.raises(SettingError) as caught:
        Settings.from_sources({}, {variable: text})
    assert str(caught.value).startswith(variable + ": ")


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("BROKER_IDLE_SECOND", "BROKER_IDLE_SECONDS"),
        ("BROKER_TURN_TIMEOUT_SECONDS", "BROKER_TURN_TIMEOUT"),
        ("BROKER_idle_seconds", "BROKER_IDLE_SECONDS"),
        ("BROKER_DATAA", "BROKER_DATA"),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest(variable, nearest):
    with pytest.raises(
        SettingError, match=rf"^{variable}: there is no such setting; the nearest is {nearest}$"
    ):
        Settings.from_sources({}, {variable: "1"}, other_variables=["BROKER_DATA"])


def test_an_unknown_name_with_nothing_near_is_an_error_too():
    with pytest.raises(SettingError, match=r"^BROKER_QQQ: there is no such setting$"):
        Settings.from_sources({}, {"BROKER_QQQ": "1"})
    with pytest.raises(SettingError, match=r"^--idle-second: .*nearest is --idle-seconds$"):
        Settings.from_sources({"idle_second": "1"}, {})
    with pytest.raises(SettingError, match=r"^tag_max: .*nearest is tags_max$"):
        Settings().override({"tag_max": 1})


def test_a_variable_that_something_else_reads_is_left_alone():
    assert Settings.from_sources({}, {"BROKER_DATA": "/x"}, other_variables=["BROKER_DATA"]) == Settings()


@pytest.mark.parametrize(
    ("smaller", "larger"),
    [("inbox_bytes_max", "receive_buffer_bytes"), ("outbox_bytes_max", "outbox_total_bytes_max")],
)
def test_two_settings_may_not_contradict_each_other(smaller, larger):
    Settings().override({smaller: 2 * MIB, larger: 2 * MIB})
    with pytest.raises(SettingError, match=f"^{smaller}: .*{larger}"):
        Settings().override({smaller: 2 * MIB + 1, larger: 2 * MIB})


def test_json_brings_every_setting_back():
    changed = Settings(
        origins=("https://a.example",), trusted_proxies=("10.0.0.0/8",), idle_seconds=3, connections_max=7,
        slow_consumer="drop_oldest",
    )  # fmt: skip
    for settings in (Settings(), changed):
        text = json.dumps(settings.to_json())
        assert Settings.from_json(json.loads(text)) == settings
    assert set(Settings().to_json()) == {setting.name for setting in SETTINGS}
    with pytest.raises(SettingError, match="no_such"):
        Settings.from_json({"no_such": 1})


def test_settings_are_cheap_to_read_and_never_change():
    settings = Settings()
    assert not hasattr(settings, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.tags_max = 1  # type: ignore[misc]
    assert settings.override({"tags_max": 1}).tags_max == 1
    assert settings.tags_max == 64


def test_a_long_value_does_not_fill_the_screen():
    with pytest.raises(SettingError) as caught:
        Settings().override({"durability": "x" * 10_000})
    assert len(str(caught.value)) < 200


def test_settings_of_rooms_are_those_about_rooms():
    assert {setting.name for setting in ROOM_SETTINGS} >= {
        "idle_seconds",
        "turn_timeout",
        "origins",
        "tags_max",
    }
    assert "max_awake_rooms" not in {setting.name for setting in ROOM_SETTINGS}
