"""The doors of the queue, for the endpoints: what they hand work in by, and where they look after it."""

from collections.abc import Callable
from typing import NamedTuple

from gateway.overflow.background import Background
from gateway.overflow.batches import Batches
from gateway.overflow.endpoints import Endpoints
from gateway.overflow.files import Files
from gateway.overflow.native_requests import NativeRequests
from gateway.overflow.store import QueueStore
from gateway.overflow.submit import Submitter
from gateway.overflow.watching import Watch


class Doors(NamedTuple):
    """One per worker. `hint` is told the lane of a new job, `cancelled` the id of one that is to be stopped: what runs here
    hears it at once."""

    store: QueueStore
    submitter: Submitter
    webhooks: Endpoints
    files: Files
    batches: Batches
    native: NativeRequests
    background: Background
    watch: Watch
    hint: Callable[[str], None]
    cancelled: Callable[[str], None]

    def start(self) -> None:
        self.files.start()
        self.batches.start()

    async def stop(self) -> None:
        """Before the store is closed."""
        await self.batches.stop()
        await self.files.stop()
        self.files.close()
