"""Webhooks as Standard Webhooks 1.0.0 has them: signed, sent to public addresses only, answered by a status.

Owns what a request to a receiver looks like and where it may go. Refuses to know events. Which address is connected to is
decided where the name is resolved, so that a name which changes its mind between a check and a connection leads nowhere;
no redirects are followed, no proxy of the environment is used, little of an answer is read.
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

TIMEOUT_S: Final = 15.0
ANSWER_BYTES: Final = 65_536
_PREFIX: Final = "whsec_"
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


def check_url(url: str, *, allows_private: bool) -> None:
    """ValueError with a sentence when a webhook cannot go there. A name may still resolve to a forbidden address."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise ValueError("a webhook's URL is not valid") from None
    if parts.scheme not in (("http", "https") if allows_private else ("https",)) or not host:
        raise ValueError(
            "a webhook's URL begins with https:// (http:// only where private addresses are allowed)"
        )
    if parts.username or parts.password or parts.fragment:
        raise ValueError("a webhook's URL has no user, password or fragment")
    if allows_private:
        return
    if port not in (None, 443):
        raise ValueError("a webhook goes to port 443; others only where private addresses are allowed")
    if host == "localhost" or host.endswith((".localhost", ".local", ".internal")):
        raise ValueError("a webhook's host must be public, or private addresses be allowed")
    try:
        is_forbidden = not is_public(host)
    except ValueError:
        return  # a name
    if is_forbidden:
        raise ValueError("a webhook's address must be public, or private addresses be allowed")


def is_public(address: str) -> bool:
    """Whether the address is one on the internet, also where it is wrapped into another. ValueError: it is none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and any(ip in network for network in _NAT64):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFF_FFFF)
        if inner is not None:
            ip = inner
    return ip.is_global and not ip.is_multicast


class _PublicResolver(AbstractResolver):
    """Addresses that are public; an OSError where a name has no others."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        public = [each for each in found if is_public(each["host"])]
        if not public:
            raise OSError(f"{host} has no public address")
        return public

    async def close(self) -> None:
        await self._resolver.close()


class Sender:
    """Sends events. One for receivers anywhere, one for those whose private addresses are allowed."""

    def __init__(self) -> None:
        self._public = _session(_PublicResolver())
        self._private = _session(aiohttp.ThreadedResolver())

    async def send(
        self, url: str, secrets: Sequence[bytes], message: tuple[str, int, bytes], *, allows_private: bool
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
        session = self._private if allows_private else self._public
        try:
            # A literal address never comes to the resolver.
            check_url(url, allows_private=allows_private)
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
                await answer.content.read(ANSWER_BYTES)
                return Outcome(answer.status, "", _retry_after_s(answer.headers.get("retry-after")))
        except TimeoutError:
            return Outcome(0, f"no answer within {TIMEOUT_S:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            reason = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
            return Outcome(0, f"{type(error).__name__}: {reason}"[:200])

    async def close(self) -> None:
        await asyncio.gather(self._public.close(), self._private.close())


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
