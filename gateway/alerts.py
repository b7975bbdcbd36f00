"""Alerts: a limit has come to so many percent. Raised once per threshold and window, over all workers.

A worker looks at what the store has just said of its counters; only a threshold that is passed costs more than a
comparison. Who raises an alert first writes it down, for the parent to deliver, and a line in the log. Rates and slots come
to their limit all the time and raise none. Over several nodes an alert has the same id on each: receivers take it once.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
from pydantic import AfterValidator, Field, SecretStr, model_validator

from gateway.limit_lifecycle import amount_text, written
from gateway.limits_config import scope_text
from gateway.stores import alert_table
from gateway.stores.alert_table import Alert
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, explained, open_database
from gateway.webhooks import check_url, read_secret
from local_engine.config import Secret, Section
from policies.limits.account import Account
from policies.limits.limit import Limit, Scope

_log = logging.getLogger(__name__)

EVENT: Final = "limit.threshold"
_MAX_REMEMBERED: Final = 20_000
_COUNTED: Final = frozenset({"period", "rolling"})


def _readable(secret: SecretStr) -> SecretStr:
    if secret.get_secret_value():
        read_secret(secret.get_secret_value())
    return secret


class WebhookConfig(Section):
    """A receiver of alerts. What it gets is signed as Standard Webhooks has it."""

    url: str = Field(min_length=1, max_length=2048)
    """Where alerts are posted: `https://...`."""
    secrets: tuple[Annotated[Secret, AfterValidator(_readable)], ...] = Field(min_length=1, max_length=4)
    """What they are signed with, `whsec_...`, from the environment; several while one replaces another. All empty:
    the entry is off."""
    private: bool = False
    """Whether it may be at a private address, without TLS and at any port."""

    @model_validator(mode="after")
    def _may_go_there(self) -> "WebhookConfig":
        check_url(self.url, allows_private=self.private)
        return self

    @property
    def is_on(self) -> bool:
        return any(secret.get_secret_value() for secret in self.secrets)


class AlertsConfig(Section):
    """When a limit of a time comes to so much of its amount: a line in the log, and a webhook."""

    thresholds: tuple[Annotated[int, Field(ge=1, le=1000)], ...] = (50, 80, 100)
    """In percent; none: no alerts."""
    webhooks: tuple[WebhookConfig, ...] = ()
    """Receivers."""


class Alerts:
    """One worker's. `observe` is for `Leases`; it is called on the event loop and never waits."""

    def __init__(self, storage: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = storage / DATABASE_NAME
        self._clock = clock
        self._thresholds: tuple[int, ...] = ()
        self._receivers: tuple[str, ...] = ()
        self._passed: dict[
            str, tuple[int, int]
        ] = {}  # by counter: its window, the highest threshold raised in it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="alerts")
        self._connection: Connection | None = None

    def configure(self, settings: AlertsConfig) -> None:
        self._thresholds = tuple(sorted(set(settings.thresholds)))
        self._receivers = tuple(webhook.url for webhook in settings.webhooks if webhook.is_on)

    def observe(self, accounts: Sequence[Account]) -> None:
        """What the store has just said of these."""
        if not self._thresholds:
            return
        least = self._thresholds[0]
        for account in accounts:
            reading, amount = account.reading, account.counter.amount
            if (
                reading is not None
                and account.counter.kind in _COUNTED
                and amount
                and reading.spent * 100 >= amount * least
            ):
                self._pass(account, reading.spent)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        if self._connection is not None:
            self._connection.close()

    def _pass(self, account: Account, spent: int) -> None:
        counter = account.counter
        window = self._window(account)
        threshold = max(each for each in self._thresholds if spent * 100 >= counter.amount * each)
        known_window, highest = self._passed.get(counter.key, (-1, 0))
        if known_window == window and highest >= threshold:
            return
        if len(self._passed) >= _MAX_REMEMBERED:
            self._passed.clear()  # the database remembers
        # Of several passed at once only the highest is news.
        self._passed[counter.key] = (window, threshold)
        alert = alert_of(account.limit, account.member, window, threshold, spent, self._clock())
        self._thread.submit(self._raise, alert, self._receivers)

    def _window(self, account: Account) -> int:
        """The period's start; a rolling window has none, so one as long as it."""
        counter = account.counter
        if counter.kind == "period":
            return counter.periods[0]
        now_us = int(self._clock() * 1e6)
        return now_us - now_us % counter.window_us

    def _raise(self, alert: Alert, receivers: tuple[str, ...]) -> None:
        try:
            if self._connection is None:
                self._connection = open_database(self._path)
            with explained(self._path):
                is_new = alert_table.put(self._connection, alert, receivers)
        except StorageError as error:
            _log.error("an alert could not be written down: %s", error)
            is_new = True  # rather twice in the log than not at all
        if is_new:
            data = orjson.loads(alert.payload)["data"]
            _log.warning(
                "a limit has come to %d %% of its amount",
                data["threshold_percent"],
                extra={name: data[name] for name in ("scope", "limit", "spent_text", "amount_text")},
            )


def alert_of(limit: Limit, member: str, window: int, threshold: int, spent: int, now_time: float) -> Alert:
    """The event, as receivers get it. Amounts in dollars as decimal text, or in whole units."""
    counter = limit.counter(member, int(now_time * 1e6))
    identity = f"{counter.key}\0{window}\0{threshold}\0{counter.amount}"
    data: dict[str, Any] = {
        "scope": scope_text(Scope(limit.scope.level, member)),
        "limit": limit.name,
        "measure": "usd" if limit.measure == "money" else limit.measure,
        "threshold_percent": threshold,
        "amount": written(limit, counter.amount),
        "spent": written(limit, spent),
        "amount_text": amount_text(limit, counter.amount),
        "spent_text": amount_text(limit, spent),
        "is_soft": limit.warns_only,
        "window_started": _iso(window / 1e6),
        "window_ends": _iso(counter.periods[1] / 1e6) if counter.kind == "period" and window else None,
    }
    event = {"type": EVENT, "timestamp": _iso(now_time), "data": data}
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return Alert(f"alert_{digest}", orjson.dumps(event), int(now_time))


def _iso(at_time: float) -> str:
    return datetime.fromtimestamp(at_time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
