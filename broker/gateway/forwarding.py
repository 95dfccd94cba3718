"""Who a request comes from: its peer, or whom a trusted proxy names (S37, S39).

Owns the list of trusted proxies, the reading of `X-Forwarded-For` and `X-Forwarded-Proto`, and the removal of
what a client must not say itself. Pure: no I/O, no settings. Its peers are the HTTP front and the upgrade
gate, so that both see the same address.
"""

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

__all__ = ["Proxies", "is_loopback", "is_loopback_host", "says_forwarded"]

OWN_PREFIXES = ("x-broker-", "x-partykit-")
"""Our header namespace: only the broker itself speaks in it (S39)."""

FORWARDING_PREFIX = "x-forwarded-"
FORWARDING_NAMES = frozenset({"forwarded", "x-real-ip"})

CHAIN_MAX = 32
"""Hops of `X-Forwarded-For` that are looked at, from the nearest; a longer chain is no real one."""

Address = IPv4Address | IPv6Address


class Proxies:
    """The proxies whose forwarding headers are believed.

    `trusted` holds addresses and networks ("10.0.0.1", "10.0.0.0/8", "::1"). Raises ValueError for anything
    else.
    """

    def __init__(self, trusted: Iterable[str] = ()) -> None:
        self._networks: tuple[IPv4Network | IPv6Network, ...] = tuple(
            [ip_network(item, strict=False) for item in trusted]
        )

    def trusts(self, address: str) -> bool:
        """Tell whether `address` is a listed proxy."""
        if not self._networks:
            return False
        parsed = _parse(address)
        return parsed is not None and self._contains(parsed)

    def client(
        self, peer: tuple[str, int], headers: Sequence[tuple[str, str]], scheme: str = "http"
    ) -> tuple[tuple[str, int], str]:
        """Give address and scheme of the client that stands behind `peer`.

        The chain is read from its near end, and the first address that is no trusted proxy is the client:
        what stands further left was written by that client itself. Its port is unknown, so 0. `headers` have
        lower-case names.
        """
        if not self.trusts(peer[0]):
            return peer, scheme
        client = peer
        for hop in _chain(headers):
            address = _parse(hop)
            if address is None:
                break
            client = (str(address), 0)
            if not self._contains(address):
                break
        for name, value in headers:
            if name == "x-forwarded-proto":
                last = value.rpartition(",")[2].strip().lower()
                scheme = last if last in {"http", "https"} else scheme
        return client, scheme

    def clean(self, peer: tuple[str, int], headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Give `headers` (lower-case names) without our namespace, and without forwarding ones unless `peer`
        is trusted.
        """
        trusted = self.trusts(peer[0])
        return [
            item
            for item in headers
            if not item[0].startswith(OWN_PREFIXES) and (trusted or not _is_forwarding(item[0]))
        ]

    def _contains(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)


def says_forwarded(headers: Iterable[tuple[str, str]]) -> bool:
    """Tell whether a proxy, or somebody who plays one, stands before us. `headers` have lower-case names."""
    return any(_is_forwarding(name) or name == "via" for name, _ in headers)


def is_loopback(address: str) -> bool:
    """Tell whether an address, as the socket gives it, is of this machine."""
    parsed = _parse(address)
    return parsed is not None and parsed.is_loopback


def is_loopback_host(host: str) -> bool:
    """Tell whether a `Host` value ("localhost:1999", "[::1]") names this machine whatever a resolver says
    (RFC 6761, 6.3).
    """
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    name = name.lower().removesuffix(".")
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _is_forwarding(name: str) -> bool:
    return name.startswith(FORWARDING_PREFIX) or name in FORWARDING_NAMES


def _chain(headers: Sequence[tuple[str, str]]) -> list[str]:
    values = [value for name, value in headers if name == "x-forwarded-for"]
    return (
        [hop.strip() for hop in ",".join(values).rsplit(",", CHAIN_MAX)[::-1]][:CHAIN_MAX] if values else []
    )


def _parse(text: str) -> Address | None:
    """An address, also as "1.2.3.4:80" or "[::1]:80"; None when it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
