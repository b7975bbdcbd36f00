"""Webhooks as Standard Webhooks 1.0.0 has them: signed, sent to public addresses only, answered by a status.

Owns what a request to a receiver looks like and where it may go. Refuses to know events. Which address is connected to is
decided where the name is resolved, so that a name which changes its mind between a check and a connection leads nowhere;
no redirects are followed, no proxy of the environment is used, little of an answer is read. Addresses that are not public
are reached only where an operator lists their network.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Networks = tuple[Network, ...]

TIMEOUT_S: Final = 15.0
ANSWER_BYTES: Final = 65_536
ANYWHERE: Final[Networks] = (ipaddress.IPv4Network("0.0.0.0/0"), ipaddress.IPv6Network("::/0"))
_PREFIX: Final = "whsec_"
_INSIDE_NAMES: Final = (".localhost", ".local", ".internal")
_NAT64: Final = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


class Outcome(NamedTuple):
    """What became of an attempt. `status` 0: no answer, and `error` says why. `retry_after_s` as the receiver asks."""

    status: int
    error: str = ""
    retry_after_s: float | None = None

    @property
    def is_delivered(self) -> bool:
        return 200 <= self.status < 300

    @property
    def is_unwanted(self) -> bool:
        """The receiver is gone for good."""
        return self.status == 410


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
    host, is_plain = _read_url(url)
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


def _read_url(url: str) -> tuple[str, bool]:
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


class _GuardedResolver(AbstractResolver):
    """Addresses within reach; an OSError where a name has no others."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        reached = [each for each in found if self._reach.covers(each["host"])]
        if not reached:
            raise OSError(f"{host} has no public address")
        return reached

    async def close(self) -> None:
        await self._resolver.close()


class Sender:
    """Sends events, with a connector of its own for each reach that receivers have."""

    def __init__(self) -> None:
        self._sessions: dict[Reach, aiohttp.ClientSession] = {}

    async def send(
        self, url: str, secrets: Sequence[bytes], message: tuple[str, int, bytes], allowed: Networks = ()
    ) -> Outcome:
        """`message`: its id, the time of this attempt, the body. Never raises for what a receiver does."""
        message_id, sent_time, body = message
        headers = {
            "content-type": "application/json",
            "user-agent": "headgate",
            "webhook-id": message_id,
            "webhook-timestamp": str(sent_time),
            "webhook-signature": signature(secrets, message_id, sent_time, body),
        }
        try:
            check_url(url, allowed)  # a literal address never comes to the resolver
            reach = Reach(allowed, may_be_public=not _read_url(url)[1])
            async with self._session(reach).post(
                url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                await answer.content.read(ANSWER_BYTES)
                return Outcome(answer.status, "", _retry_after_s(answer.headers.get("retry-after")))
        except TimeoutError:
            return Outcome(0, f"no answer within {TIMEOUT_S:g} s")
        except aiohttp.InvalidURL:  # its text has the URL, whose path may be a secret of its own
            return Outcome(0, "the URL is not valid")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
            return Outcome(0, f"{type(error).__name__}: {reason}"[:200])

    async def close(self) -> None:
        await asyncio.gather(*(session.close() for session in self._sessions.values()))

    def _session(self, reach: Reach) -> aiohttp.ClientSession:
        session = self._sessions.get(reach)
        if session is None:
            session = self._sessions[reach] = _session(_GuardedResolver(reach))
        return session


def _session(resolver: AbstractResolver) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False, limit=20, force_close=True)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
        trust_env=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    )


def _retry_after_s(value: str | None) -> float | None:
    return float(value) if value is not None and value.isdecimal() and len(value) < 9 else None
