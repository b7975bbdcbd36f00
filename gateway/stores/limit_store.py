"""The contract of a store of limits, for whoever keeps counters beyond one process.

`policies.limits.messages` says what an update means. Invariants every store holds: an update is applied whole
or not at all, and once; its time never runs backwards; after StoreAwayError nobody knows whether it was applied,
and repeating the same update is safe.
"""

from collections.abc import Sequence
from typing import Protocol

from policies.limits.messages import Counter, Reading, Reply, Update


class StoreAwayError(Exception):
    """The store did not answer in time, or cannot. The message is for the log."""


class LimitStore(Protocol):
    """One per worker. Not for concurrent use: a worker has one update under way at a time."""

    async def update(self, update: Update) -> Reply:
        """StoreAwayError when there is no answer."""

    async def read(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]:
        """The store's time and where the counters stand; changes nothing. StoreAwayError as above."""

    async def close(self) -> None: ...
