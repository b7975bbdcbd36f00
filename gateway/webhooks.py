"""Webhooks as Standard Webhooks 1.0.0 has them: who gets one, how it is signed, where it may go.

Refuses to know events, and sends nothing: this is what the configuration and the workers need of webhooks. Addresses that
are not public are reached only where an operator lists their network.
"""

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import urlsplit

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Networks = tuple[Network, ...]

ANYWHERE: Final[Networks] = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))
_PREFIX: Final = "whsec_"
_INSIDE_NAMES: Final = (".localhost", ".local", ".internal")
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


class Receiver(NamedTuple):
    """Where to, signed with what, and where beside the internet that may be."""

    url: str
    secrets: tuple[bytes, ...]
    allowed: Networks = ()

    def __repr__(self) -> str:
        return f"Receiver({host_of(self.url)!r})"


def host_of(url: str) -> str:
    """A URL's path may be a secret of its own."""
    return url.split("/")[2]


def read_secret(text: str) -> bytes:
    """`whsec_` and base64 of 24 to 64 bytes. ValueError with a sentence that does not repeat it."""
    problem = "a webhook's secret is whsec_ and the base64 of 24 to 64 random bytes"
    if not text.startswith(_PREFIX):
        raise ValueError(problem)
    try:
        secret = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
    except ValueError:
        raise ValueError(problem) from None
    if not 24 <= len(secret) <= 64:
        raise ValueError(problem)
    return secret


def signature(secrets: Sequence[bytes], message_id: str, sent_time: int, body: bytes) -> str:
    """One for each secret, so that a receiver may take the next one before the last is gone."""
    signed = f"{message_id}.{sent_time}.".encode() + body
    return " ".join(
        "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode() for secret in secrets
    )


def check_url(url: str, allowed: Networks = ()) -> None:
    """ValueError with a sentence when a webhook cannot go there; a name may still resolve to a forbidden address.

    To a public address: https and port 443. Any other scheme, port or address must be in a network that is `allowed`.
    """
    host, is_plain = read_url(url)
    if allowed:
        reach = Reach(allowed, may_be_public=not is_plain)
    elif is_plain:
        raise ValueError(
            "a webhook's URL begins with https:// and has no port (others only inside allowed networks)"
        )
    else:
        reach = PUBLIC
        if host == "localhost" or host.endswith(_INSIDE_NAMES):
            raise ValueError("a webhook's host must be public, or in a network that is allowed")
    try:
        may_go = reach.covers(host)
    except ValueError:
        return  # a name
    if not may_go:
        raise ValueError("a webhook's address must be public, or in a network that is allowed")


def read_url(url: str) -> tuple[str, bool]:
    """The host, and whether the URL is another than https to port 443. ValueError: it is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("a webhook's URL is not valid") from None
    if (
        parts.scheme not in ("http", "https")
        or not host
        or not url.isascii()
        or not url.isprintable()
        or " " in url
    ):
        raise ValueError("a webhook's URL begins with https://")
    if parts.username or parts.password or parts.fragment:
        raise ValueError("a webhook's URL has no user, password or fragment")
    return host, parts.scheme == "http" or port not in (None, 443)


class Reach(NamedTuple):
    """Where a connection may end: in these networks, and perhaps anywhere on the internet."""

    networks: Networks
    may_be_public: bool

    def covers(self, address: str) -> bool:
        """ValueError: it is no address."""
        ip = _unwrapped(address)
        return (self.may_be_public and _is_global(ip)) or any(ip in network for network in self.networks)


PUBLIC: Final = Reach((), may_be_public=True)


def is_public(address: str) -> bool:
    """Whether the address is one on the internet, also where it is wrapped into another. ValueError: it is none."""
    return _is_global(_unwrapped(address))


def _unwrapped(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    ip = ipaddress.ip_address(address.partition("%")[0])
    if not isinstance(ip, ipaddress.IPv6Address):
        return ip
    inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
    if inner is None and (any(ip in network for network in _NAT64) or 1 < int(ip) <= 0xFFFF_FFFF):
        inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
    return ip if inner is None else inner


def _is_global(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return ip.is_global and not ip.is_multicast
