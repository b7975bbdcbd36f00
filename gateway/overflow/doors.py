"""The doors of the queue, for the endpoints: what they hand work in by, and where they look after it."""

from typing import NamedTuple

from gateway.overflow.background import Background
from gateway.overflow.batches import Batches
from gateway.overflow.endpoints import Endpoints
from gateway.overflow.files import Files
from gateway.overflow.native_requests import NativeRequests
from gateway.overflow.store import QueueStore
from gateway.overflow.submit import Submitter


class Doors(NamedTuple):
    """One per worker."""

    store: QueueStore
    submitter: Submitter
    webhooks: Endpoints
    files: Files
    batches: Batches
    native: NativeRequests
    background: Background

    def start(self) -> None:
        self.batches.start()

    async def stop(self) -> None:
        """Before the store is closed."""
        await self.batches.stop()
        self.files.close()
