"""Whose request it is, by a peer's word or by a trusted proxy's."""

import pytest

from broker.gateway.forwarding import Proxies, is_loopback, is_loopback_host, says_forwarded

PROXY = ("10.0.0.1", 5000)
CLIENT = ("9.9.9.9", 5000)


def forwarded(*values: str) -> list[tuple[str, str]]:
    return [("x-forwarded-for", value) for value in values]


def test_nobody_is_trusted_unless_listed() -> None:
    """Row 52."""
    headers = [*forwarded("1.2.3.4"), ("x-forwarded-proto", "https")]
    for proxies in (Proxies(), Proxies(["10.0.0.0/8"])):
        assert proxies.client(CLIENT, headers) == (CLIENT, "http")


@pytest.mark.parametrize(
    ("chain", "client"),
    [
        ([], "10.0.0.1"),
        (["1.2.3.4"], "1.2.3.4"),
        (["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
        (["6.6.6.6", "1.2.3.4, 10.1.1.1"], "1.2.3.4"),
        (["6.6.6.6, 1.2.3.4,10.1.1.1 , 10.2.2.2"], "1.2.3.4"),
        (["10.3.3.3, 10.1.1.1"], "10.3.3.3"),
        (["1.2.3.4:8080"], "1.2.3.4"),
        (["[2001:db8::1]:8080"], "2001:db8::1"),
        (["2001:db8::1"], "2001:db8::1"),
        (["::ffff:1.2.3.4"], "1.2.3.4"),
        (["6.6.6.6, unknown"], "10.0.0.1"),
        (["6.6.6.6, unknown, 10.1.1.1"], "10.1.1.1"),
        ([""], "10.0.0.1"),
        ([", ".join(["10.0.0.9"] * 5000)], "10.0.0.9"),
    ],
)
def test_the_client_is_the_nearest_hop_that_is_no_proxy(chain: list[str], client: str) -> None:
    """S37: what stands further left was written by the client itself."""
    address, _ = Proxies(["10.0.0.0/8"]).client(PROXY, forwarded(*chain))
    assert address[0] == client


@pytest.mark.parametrize(
    ("value", "scheme"),
    [("https", "https"), ("http, HTTPS", "https"), ("https, gopher", "http"), ("", "http")],
)
def test_a_proxy_says_which_scheme_its_client_used(value: str, scheme: str) -> None:
    assert Proxies(["10.0.0.1"]).client(PROXY, [("x-forwarded-proto", value)])[1] == scheme


def test_headers_are_cleaned_by_whom_they_come_from() -> None:
    """S39."""
    headers = [
        ("host", "a"),
        ("x-broker-a", "1"),
        ("x-partykit-b", "2"),
        ("x-forwarded-for", "3"),
        ("x-real-ip", "4"),
    ]
    proxies = Proxies(["10.0.0.1", "fd00::/8"])
    assert proxies.clean(CLIENT, headers) == [("host", "a")]
    assert proxies.clean(PROXY, headers) == [("host", "a"), ("x-forwarded-for", "3"), ("x-real-ip", "4")]
    assert proxies.trusts("fd00::1")
    assert proxies.trusts("::ffff:10.0.0.1")
    assert not proxies.trusts("fe80::1%eth0")
    assert not proxies.trusts("no address")


def test_what_is_no_network_is_no_proxy() -> None:
    with pytest.raises(ValueError, match="example"):
        Proxies(["proxy.example"])


def test_a_proxy_before_us_shows_in_the_headers() -> None:
    for name in ("x-forwarded-host", "forwarded", "via", "x-real-ip"):
        assert says_forwarded([("host", "a"), (name, "b")])
    assert not says_forwarded([("host", "a"), ("forwarding", "b")])


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:80",
        "a.localhost",
        "localhost.",
        "127.0.0.1",
        "127.9.9.9:1",
        "[::1]",
        "[::1]:80",
    ],
)
def test_hosts_of_this_machine(host: str) -> None:
    assert is_loopback_host(host)


@pytest.mark.parametrize(
    "host",
    ["", "localhost.evil.example", "notlocalhost", "127.0.0.1.evil.example", "10.0.0.1", "[::2]", "0.0.0.0"],
)
def test_hosts_of_elsewhere(host: str) -> None:
    assert not is_loopback_host(host)


def test_peers_of_this_machine() -> None:
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("::ffff:127.0.0.1")
    assert not is_loopback("10.0.0.1")
    assert not is_loopback("")
