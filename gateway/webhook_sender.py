"""Sending a webhook: one request to a receiver, and what became of it.

Needs aiohttp, and so only the parent process imports it. Which address is connected to is decided where the name is
resolved, so that a name which changes its mind between a check and a connection leads nowhere; no redirects are followed,
no proxy of the environment is used, little of an answer is read.
"""

import asyncio
import socket
from collections.abc import Sequence
from typing import Final, NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from gateway.webhooks import Networks, Reach, check_url, read_url, signature

TIMEOUT_S: Final = 15.0
ANSWER_BYTES: Final = 65_536


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
            reach = Reach(allowed, may_be_public=not read_url(url)[1])
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
