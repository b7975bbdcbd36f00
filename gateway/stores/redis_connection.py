"""A connection to Redis (6.2 or newer) or Valkey: made from a URL, every call within its time, scripts by their hash.

Owns what is the same for all that Headgate keeps there; refuses to know what that is. Whatever goes wrong is a
StoreAwayError whose text has no address and no password. Imported only where `storage.redis` is set: the library
takes 20 MB and a tenth of a second.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from hashlib import sha1
from typing import Any, Final

import redis.exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from gateway.stores.limit_store import StoreAwayError

VERSION_FLOOR: Final = (6, 2)


class Script:
    """A Lua script; its text is sent only to a server that does not know it yet."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.sha = sha1(text.encode(), usedforsecurity=False).hexdigest()


class RedisConnection:
    """For one caller at a time; a call that was cut ends the connection, and the next one makes a new one.

    `tag` is the hash tag of every key: whatever is touched together must be on one node of a cluster.
    """

    def __init__(self, url: str, tag: str, *, timeout_s: float = 0.1, ca_file: str | None = None) -> None:
        self._timeout_s = timeout_s
        self._prefix = f"{{{tag}}}:"
        trust: dict[str, Any] = (
            {"ssl_ca_certs": ca_file} if ca_file is not None and url.startswith("rediss:") else {}
        )
        # Answers stay bytes; a failed call is not repeated here: only its caller knows whether it may be.
        self._client: Redis = Redis.from_url(
            url,
            single_connection_client=True,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            socket_connect_timeout=timeout_s,
            socket_timeout=None,  # the whole call has its time below
            client_name="headgate",
            driver_info=None,
            **trust,
        )

    def key(self, name: str) -> str:
        return self._prefix + name

    async def call(self, *words: Any, timeout_s: float | None = None) -> Any:
        """One command's answer. StoreAwayError when there is none in time, or when it is an error."""
        try:
            async with asyncio.timeout(timeout_s or self._timeout_s):
                return await self._client.execute_command(*words)  # type: ignore[no-untyped-call]  # the library does not say
        except TimeoutError:
            raise StoreAwayError("no answer in time") from None
        except redis.exceptions.TimeoutError:
            raise StoreAwayError("no connection in time") from None
        except redis.exceptions.NoScriptError:
            raise
        except redis.exceptions.ResponseError as error:
            # The server's own words, such as LOADING, READONLY, OOM, NOAUTH; never what was sent.
            raise StoreAwayError(f"it answers: {str(error)[:200]}") from None
        except (redis.exceptions.RedisError, OSError) as error:
            raise StoreAwayError(f"no connection ({type(error).__name__})") from None

    async def run(
        self, script: Script, keys: Sequence[str], arguments: Sequence[Any], timeout_s: float | None = None
    ) -> Any:
        """The script's answer, in one round trip where the server has seen it before."""
        try:
            return await self.call("EVALSHA", script.sha, len(keys), *keys, *arguments, timeout_s=timeout_s)
        except redis.exceptions.NoScriptError:
            return await self.call("EVAL", script.text, len(keys), *keys, *arguments, timeout_s=timeout_s)

    async def problems(self) -> list[str]:
        """What an operator should change on the server, sentences; empty when all is well."""
        found = []
        version = str((await self.call("INFO", "server"))["redis_version"])
        if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < VERSION_FLOOR:
            found.append(f"storage.redis: the server is {version}; 6.2 or newer is needed (or Valkey)")
        policy = (await self.call("INFO", "memory")).get("maxmemory_policy", "noeviction")
        if policy.startswith("allkeys"):
            found.append(
                f"storage.redis: maxmemory-policy is {policy}, so counters may vanish when memory is short; set noeviction"
            )
        return found

    async def close(self) -> None:
        with contextlib.suppress(redis.exceptions.RedisError, OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await self._client.aclose()
