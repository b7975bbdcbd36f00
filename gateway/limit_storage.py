"""Where a worker's limits are counted: on this machine, or in Redis for several nodes. Chosen by the configuration.

Redis is behind a guard that answers in its place when it is away; the embedded store is as near as the ledger, and
needs none.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

from gateway.config import StorageConfig
from gateway.redis_config import RedisConfig
from gateway.stores.ledger_sink import LedgerSink
from gateway.stores.limit_away import AwayHealth, GuardedLimitStore
from gateway.stores.limit_sqlite import SqliteLimitStore
from gateway.stores.limit_store import LimitStore
from gateway.telemetry import Telemetry
from policies.limits.messages import Counter

_NOWHERE = AwayHealth(is_away=False, absences=0, away_s=0.0, answers=0, last_error="")


class SharedLimitStore(LimitStore, Protocol):
    """A store that may have lost everything, and is filled again from the ledger."""

    async def is_filled(self) -> bool: ...

    async def fill(self, spent: list[tuple[Counter, Mapping[int, int]]]) -> None: ...

    async def take_turn(self, length_s: float) -> bool:
        """Whether nobody else has the turn to set counters right; it ends by itself."""

    async def end_turn(self) -> None: ...

    async def problems(self) -> list[str]:
        """What an operator should change there."""


class LimitStorage:
    """One per worker. `open` is called when there is a first limit."""

    def __init__(self, settings: StorageConfig) -> None:
        self._settings = settings
        self._guard: GuardedLimitStore | None = None

    def open(self) -> LimitStore:
        """StorageError when there can be none; that Redis is away now is no reason."""
        redis = self._settings.redis
        if redis is None:
            return SqliteLimitStore(self._settings.directory)
        # The guard keeps the time: it can tell a late loop from a late store.
        timeout_s = redis.timeout_ms / 1000
        self._guard = GuardedLimitStore(
            open_redis_store(redis, timeout_s=10 * timeout_s), timeout_s=timeout_s
        )
        return self._guard

    def health(self) -> AwayHealth:
        """Of Redis, as far as limits need it."""
        return _NOWHERE if self._guard is None else self._guard.health()

    def watch(self, telemetry: Telemetry) -> None:
        """Without Redis there is nothing to tell."""
        if self._settings.redis is None:
            return
        watch, health = telemetry.watch, self.health
        watch(
            "headgate_limit_store_away",
            "gauge",
            "Workers that get no answer from Redis and go by `when_away`.",
            lambda: int(health().is_away),
        )
        watch(
            "headgate_limit_store_absences_total",
            "counter",
            "Times a worker got no answer from Redis within `storage.redis.timeout_ms`.",
            lambda: health().absences,
        )
        watch(
            "headgate_limit_store_away_seconds_total",
            "counter",
            "How long workers were without Redis, added up.",
            lambda: health().away_s,
        )
        watch(
            "headgate_limit_store_substituted_total",
            "counter",
            "Answers about limits that were given in the place of Redis.",
            lambda: health().answers,
        )


def connect(settings: RedisConfig, timeout_s: float) -> Any:
    """A `gateway.stores.redis_connection.RedisConnection`; nothing is sent yet."""
    # By name at run time: redis-py is 20 MB that a gateway on one machine does not need.
    module = importlib.import_module("gateway.stores.redis_connection")
    ca_file = None if settings.ca_file is None else str(settings.ca_file)
    return module.RedisConnection(
        settings.url.get_secret_value(), settings.prefix, timeout_s=timeout_s, ca_file=ca_file
    )


def open_redis_store(settings: RedisConfig, timeout_s: float) -> SharedLimitStore:
    module = importlib.import_module("gateway.stores.limit_redis")
    return cast("SharedLimitStore", module.RedisLimitStore(connect(settings, timeout_s)))


def open_ledger_sink(settings: RedisConfig, node: str, timeout_s: float) -> LedgerSink:
    module = importlib.import_module("gateway.stores.ledger_stream")
    return cast("LedgerSink", module.RedisLedgerStream(connect(settings, timeout_s), node))
