"""Waiting for something to happen to a job: its end, or more of its stream.

A job may be run by any worker of any node, so the store is asked again and again, less often the longer it takes; what
happens in this worker is told at once. Knows no HTTP.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from gateway.overflow.job import Event, Job
from gateway.overflow.store import QueueStore

_SOONEST_S: Final = 0.05
_LATEST_S: Final = 0.5
_PAGE: Final = 200


class Watch:
    """One per worker."""

    def __init__(self, store: QueueStore) -> None:
        self._store = store
        self._waiting: dict[str, set[asyncio.Event]] = {}

    def changed(self, job_id: str) -> None:
        """Something happened to it here, and is in the store."""
        for event in self._waiting.get(job_id, ()):
            event.set()

    async def final(self, tenant: str, job_id: str, until_at: float) -> Job | None:
        """The job when it has ended, or as it stands at `until_at` (monotonic); None: there is no such job."""
        async with self._watching(job_id) as changed:
            began_at = time.monotonic()
            while True:
                job = await self._store.get(tenant, job_id)
                now = time.monotonic()
                if job is None or job.is_final or now >= until_at:
                    return job
                await _wait(changed, began_at, until_at)

    async def events(
        self, tenant: str, job_id: str, after: int, until_at: float
    ) -> AsyncGenerator[Event | None]:
        """The events of its stream with a higher index, as they come. None, now and then while there are none, so that
        its reader may do something else; it ends with the job, or at `until_at`."""
        async with self._watching(job_id) as changed:
            quiet_at = time.monotonic()
            while True:
                # Looked at first: what was written before it ended is there then.
                job = await self._store.get(tenant, job_id)
                events = await self._store.events_after(tenant, job_id, after, _PAGE)
                for event in events:
                    yield event
                    after, quiet_at = event.index, time.monotonic()
                if events:
                    continue
                if job is None or job.is_final or time.monotonic() >= until_at:
                    return
                yield None
                await _wait(changed, quiet_at, until_at)

    @contextlib.asynccontextmanager
    async def _watching(self, job_id: str) -> AsyncIterator[asyncio.Event]:
        changed = asyncio.Event()
        waiting = self._waiting.setdefault(job_id, set())
        waiting.add(changed)
        try:
            yield changed
        finally:
            waiting.discard(changed)
            if not waiting:
                self._waiting.pop(job_id, None)


async def _wait(changed: asyncio.Event, began_at: float, until_at: float) -> None:
    """Until told, or until it is time to ask again."""
    now = time.monotonic()
    pause_s = min(max((now - began_at) / 10, _SOONEST_S), _LATEST_S, max(until_at - now, 0.001))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(pause_s):
            await changed.wait()
    changed.clear()
