"""The queue's part of the parent process: it delivers webhooks, and gives back what dead workers had.

Owns the parent's own view of the store, which management and metrics look through. Runs no job.
"""

import logging
import os
from collections.abc import Callable

from gateway.config import Config
from gateway.overflow.bodies import open_bodies
from gateway.overflow.endpoints import Endpoints
from gateway.overflow.opening import node_of, open_endpoints, open_store, owner_name
from gateway.overflow.store import StoreAwayError
from gateway.overflow.webhooks import QueueWebhooks

_log = logging.getLogger(__name__)


class ServiceQueue:
    """One per service. StorageError when its storage cannot be used."""

    def __init__(self, config: Callable[[], Config], pepper: bytes) -> None:
        settings = config()
        self.store = open_store(settings, open_bodies(settings.queue.encryption))
        self._node = node_of(settings)
        endpoints = Endpoints(lambda: config().queue.webhooks, open_endpoints(settings), pepper)
        self.webhooks = QueueWebhooks(
            self.store,
            endpoints,
            lambda: config().queue.webhooks,
            owner_name(self._node, "parent", os.getpid()),
        )

    async def run(self) -> None:
        """Delivers webhooks, until cancelled."""
        await self.webhooks.run()

    async def worker_died(self, name: str, pid: int) -> None:
        """Its jobs are ready for others now, not when their leases lapse."""
        try:
            jobs = await self.store.owner_died(owner_name(self._node, name, pid))
        except StoreAwayError as error:
            _log.error("jobs of a dead worker wait for its leases to lapse: %s", error)
        else:
            if jobs:
                _log.warning("jobs of a dead worker are ready again", extra={"worker": name, "count": jobs})

    async def close(self) -> None:
        await self.webhooks.close()
        await self.store.close()
