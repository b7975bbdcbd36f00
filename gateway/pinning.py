"""A request that continues an answer goes where that was made: looked up in memory, else in the ledger.

The ledger knows what other workers answered, and what was answered before a restart. It is asked on a thread, and
only about ids that this worker has not seen, of models that have more than one endpoint.
"""

import asyncio
from pathlib import Path

from gateway.stores.ledger_table import origin_of
from gateway.stores.sqlite import DATABASE_NAME, StorageError, database
from policies.exchange import Caller, Exchange
from policies.placement.origins import Origin, Origins


class Pinning:
    """One per worker. `origins` learns what this worker answers."""

    def __init__(self, storage: Path) -> None:
        self.origins = Origins()
        self._path = storage / DATABASE_NAME

    async def pin(self, exchange: Exchange) -> None:
        """Sets where the request must go, and whose session it is. An id that nobody knows is the upstream's to refuse."""
        caller, model, answer_id = exchange.caller, exchange.model, exchange.continues
        if caller is None or model is None or sum(len(t.pool.endpoints) for t in model.targets) < 2:
            return
        origin = self.origins.find(caller, answer_id)
        if origin is None:
            origin = await asyncio.to_thread(self._look_up, caller, answer_id)
            if origin is None:
                return
            self.origins.put(caller, answer_id, origin)
        exchange.pinned_to = origin.endpoint
        exchange.session_hash = exchange.session_hash or origin.session

    def _look_up(self, caller: Caller, answer_id: str) -> Origin | None:
        try:
            with database(self._path, may_write=False) as connection:
                found = origin_of(connection, answer_id, caller.team, caller.key_id)
        except StorageError:
            return None  # the request is worth a try without it
        return None if found is None else Origin(found[0], found[1] % 2**64)
