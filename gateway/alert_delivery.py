"""Alerts on their way to receivers: their outbox is in the database, and the parent of this machine empties it."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gateway.alerts import AlertsConfig
from gateway.stores import alert_table
from gateway.stores.alert_table import Alert, Delivery
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, database
from gateway.webhook_delivery import LEASE_S
from gateway.webhooks import Receiver

_FORGET_S: Final = 3600.0

_log = logging.getLogger(__name__)


def receivers_of(settings: AlertsConfig) -> dict[str, Receiver]:
    """By their URL, which is what a delivery knows them by."""
    return {webhook.url: webhook.receiver() for webhook in settings.webhooks if webhook.is_on}


class AlertOutbox:
    """An Outbox. `receivers` is asked anew each time: a reload may change them."""

    def __init__(self, storage: Path, receivers: Callable[[], Mapping[str, Receiver]]) -> None:
        self._path = storage / DATABASE_NAME
        self._receivers = receivers
        self._forget_time = 0.0

    async def raise_one(self, alert: Alert) -> None:
        """Written down, for every receiver there is now; on the way when delivery looks next."""
        receivers = tuple(self._receivers())
        try:
            await self._run(lambda c: alert_table.put(c, alert, receivers))
        except StorageError as error:
            _log.error("an alert could not be written down: %s", error)

    async def take(self, most: int, now_time: float) -> Sequence[Delivery]:
        if not self._receivers():
            return ()
        taken: list[Delivery] = await self._run(lambda c: self._take(c, most, now_time))
        return taken

    def _take(self, connection: Connection, most: int, now_time: float) -> list[Delivery]:
        if now_time >= self._forget_time:
            self._forget_time = now_time + _FORGET_S
            alert_table.forget(connection, now_time)
        return alert_table.take(connection, now_time, most, LEASE_S)

    async def opened(self, message: Delivery) -> tuple[Receiver, bytes] | None:
        receiver = self._receivers().get(message.receiver)
        return None if receiver is None else (receiver, message.payload)

    async def end(self, message: Delivery, error: str) -> None:
        await self._run(lambda c: alert_table.end(c, message, error))

    async def retry(self, message: Delivery, next_time: float, error: str) -> None:
        await self._run(lambda c: alert_table.retry(c, message, next_time, error))

    async def put_off(self, message: Delivery, next_time: float) -> None:
        await self._run(lambda c: alert_table.put_off(c, message, next_time))

    async def refused(self, message: Delivery) -> None:
        """It is in the configuration: only its operator takes it out."""

    async def _run(self, work: Callable[[Connection], Any]) -> Any:
        def run() -> Any:
            with database(self._path) as connection:
                return work(connection)

        return await asyncio.to_thread(run)
