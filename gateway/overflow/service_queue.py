"""The queue's part of the parent process: it delivers webhooks, and gives back what dead workers had, those included that
died with the parent before it.

Owns the parent's own view of the store, which management and metrics look through. Runs no job.
"""

import logging
import os
from collections.abc import Callable
from typing import Final

from gateway.config import Config
from gateway.overflow.bodies import open_bodies
from gateway.overflow.endpoints import Endpoints
from gateway.overflow.job import JobFilter
from gateway.overflow.opening import node_of, open_endpoints, open_store, owner_name
from gateway.overflow.operating import QueueOperators
from gateway.overflow.store import StoreAwayError
from gateway.overflow.webhooks import QueueWebhooks

_PAGE: Final = 200

_log = logging.getLogger(__name__)


class ServiceQueue:
    """One per service. StorageError when its storage cannot be used."""

    def __init__(self, config: Callable[[], Config], pepper: bytes, draw: Callable[[bool], None]) -> None:
        """`draw` tells every worker whether to claim jobs."""
        settings = config()
        self.store = open_store(settings, open_bodies(settings.queue.encryption))
        self.operators = QueueOperators(self.store, draw)
        self._node = node_of(settings)
        self._owner = f"{self._node}:parent"  # the next one knows by it what this one had
        endpoints = Endpoints(lambda: config().queue.webhooks, open_endpoints(settings), pepper)
        self.webhooks = QueueWebhooks(
            self.store,
            endpoints,
            lambda: config().queue.webhooks,
            self._owner,
        )

    async def recover(self) -> None:
        """What processes of this machine had that are no more. Once, before there are new ones."""
        try:
            await self.store.owner_died(self._owner)
            for owner in await self._dead_owners():
                await self._give_back(owner)
        except StoreAwayError as error:
            _log.error("jobs of an earlier run wait for their leases to lapse: %s", error)

    async def _dead_owners(self) -> set[str]:
        owners: set[str] = set()
        cursor: str | None = None
        while True:
            where = JobFilter(states=("running", "cancelling"))
            page = await self.store.list_jobs(where, cursor, _PAGE)
            owners.update(job.owner for job in page.jobs if job.owner.startswith(f"{self._node}:"))
            cursor = page.cursor
            if cursor is None:
                return {owner for owner in owners if not _is_alive(owner)}

    async def run(self) -> None:
        """Delivers webhooks, until cancelled."""
        await self.webhooks.run()

    async def worker_died(self, name: str, pid: int) -> None:
        """Its jobs are ready for others now, not when their leases lapse."""
        try:
            await self._give_back(owner_name(self._node, name, pid))
        except StoreAwayError as error:
            _log.error("jobs of a dead worker wait for its leases to lapse: %s", error)

    async def _give_back(self, owner: str) -> None:
        jobs = await self.store.owner_died(owner)
        if jobs:
            worker = owner.partition(":")[2]
            _log.warning("jobs of a dead worker are ready again", extra={"worker": worker, "count": jobs})

    async def close(self) -> None:
        await self.webhooks.close()
        await self.store.close()


def _is_alive(owner: str) -> bool:
    """A process of the same number may be another one: then its leases lapse by themselves."""
    pid = owner.rpartition("@")[2]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (ValueError, PermissionError):
        return True
    return True
