"""Alerts on their way to receivers: an outbox in the database, emptied by the parent.

An alert is delivered at least once, always under its own id. A receiver that fails is tried again for two days, less and
less often; one that answers 410 is not asked again about that alert.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from gateway.alerts import AlertsConfig
from gateway.stores import alert_table
from gateway.stores.alert_table import Alert, Delivery
from gateway.stores.sqlite import DATABASE_NAME, StorageError, database
from gateway.webhooks import Outcome, Sender, read_secret

# After the first attempt; each with up to a tenth more, so that many do not come back at once.
RETRIES_S: Final = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 10_800.0, 21_600.0, 43_200.0, 86_400.0)
_LONGEST_RETRY_AFTER_S: Final = 86_400.0
_POLL_S: Final = 2.0
_AT_ONCE: Final = 20
_FORGET_S: Final = 3600.0

_log = logging.getLogger(__name__)


class Receiver(NamedTuple):
    """Where to, signed with what."""

    url: str
    secrets: tuple[bytes, ...]
    allows_private: bool

    def __repr__(self) -> str:
        return f"Receiver({self.url!r})"


def receivers_of(settings: AlertsConfig) -> dict[str, Receiver]:
    """By their URL, which is what a delivery knows them by."""
    return {
        webhook.url: Receiver(
            webhook.url,
            tuple(read_secret(text) for secret in webhook.secrets if (text := secret.get_secret_value())),
            webhook.private,
        )
        for webhook in settings.webhooks
        if webhook.is_on
    }


class AlertDelivery:
    """One per service. `receivers` is asked anew each time: a reload may change them."""

    def __init__(
        self,
        storage: Path,
        receivers: Callable[[], Mapping[str, Receiver]],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.delivered = 0
        self.failed = 0
        self._path = storage / DATABASE_NAME
        self._receivers = receivers
        self._clock = clock
        self._forget_time = 0.0

    async def raise_one(self, alert: Alert) -> None:
        """Written down, for every receiver there is now; on the way when `run` looks next."""
        receivers = tuple(self._receivers())
        try:
            await asyncio.to_thread(self._put, alert, receivers)
        except StorageError as error:
            _log.error("an alert could not be written down: %s", error)

    async def run(self) -> None:
        """Until cancelled."""
        sender = Sender()
        try:
            while True:
                receivers = self._receivers()
                if receivers:
                    try:
                        await self.deliver_due(sender, receivers)
                    except StorageError as error:
                        _log.error("alerts wait: %s", error)
                await asyncio.sleep(_POLL_S)
        finally:
            await sender.close()

    async def deliver_due(self, sender: Sender, receivers: Mapping[str, Receiver]) -> int:
        """All whose time has come, once each. Returns how many there were."""
        deliveries = await asyncio.to_thread(self._due)
        await asyncio.gather(*(self._deliver(sender, receivers, each) for each in deliveries))
        return len(deliveries)

    def _put(self, alert: Alert, receivers: tuple[str, ...]) -> None:
        with database(self._path) as connection:
            alert_table.put(connection, alert, receivers)

    def _due(self) -> list[Delivery]:
        now_time = self._clock()
        with database(self._path) as connection:
            if now_time >= self._forget_time:
                self._forget_time = now_time + _FORGET_S
                alert_table.forget(connection, now_time)
            return alert_table.due(connection, now_time, _AT_ONCE)

    async def _deliver(self, sender: Sender, receivers: Mapping[str, Receiver], delivery: Delivery) -> None:
        receiver = receivers.get(delivery.receiver)
        if receiver is None:
            await asyncio.to_thread(self._end, delivery, "no longer configured")
            return
        message = (delivery.alert_id, int(self._clock()), delivery.payload)
        outcome = await sender.send(
            receiver.url, receiver.secrets, message, allows_private=receiver.allows_private
        )
        if outcome.is_delivered:
            self.delivered += 1
            await asyncio.to_thread(self._end, delivery, "")
            return
        self.failed += 1
        told = outcome.error or f"status {outcome.status}"
        is_last = outcome.is_unwanted or delivery.attempts >= len(RETRIES_S)
        _log.warning(
            "an alert was not delivered%s",
            " and is given up" if is_last else "; it will be tried again",
            extra={"alert": delivery.alert_id, "receiver": _host_of(receiver.url), "reason": told},
        )
        if is_last:
            await asyncio.to_thread(self._end, delivery, told)
        else:
            await asyncio.to_thread(self._retry, delivery, self._clock() + _delay_s(delivery, outcome), told)

    def _end(self, delivery: Delivery, outcome: str) -> None:
        with database(self._path) as connection:
            alert_table.end(connection, delivery, outcome)

    def _retry(self, delivery: Delivery, next_time: float, error: str) -> None:
        with database(self._path) as connection:
            alert_table.retry(connection, delivery, next_time, error)


def _delay_s(delivery: Delivery, outcome: Outcome) -> float:
    delay_s = RETRIES_S[delivery.attempts]
    delay_s *= 1 + random.random() / 10  # noqa: S311 - spreads load, hides nothing
    return max(delay_s, min(outcome.retry_after_s or 0.0, _LONGEST_RETRY_AFTER_S))


def _host_of(url: str) -> str:
    """A URL's path may be a secret of its own."""
    return url.split("/")[2]
