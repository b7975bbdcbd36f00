"""What the ends of jobs owe to the ledger, on its way there: out of the store's `settled` rows, into the database.

A row was written in the transaction that ended its job; it is entered in the ledger, whose primary key is the job's id,
and only then crossed off. So a crash anywhere delays a row and never doubles it. Every worker does this; whoever takes
rows has them for a while. Limits are counted by the worker that ran the job, and set right from the ledger, as for every
request.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from gateway.ledger_row import LedgerRow
from gateway.overflow.running import read_row
from gateway.overflow.store import QueueStore, StoreAwayError

_EVERY_S: Final = 2.0
_SOON_S: Final = 0.1  # after one of our own has ended: the others that end now go along
_MOST: Final = 200
_RETRY_S: Final = 2.0

_log = logging.getLogger(__name__)

# Enters rows in the ledger; True once they are there.
Enter = Callable[[Sequence[LedgerRow]], Awaitable[bool]]


class SettledFlow:
    """One per worker. `rows` are those that went through it."""

    def __init__(self, store: QueueStore, owner: str, enter: Enter) -> None:
        self.rows = 0
        self._store = store
        self._owner = owner
        self._enter = enter
        self._wanted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="queue-settled")

    def wake(self) -> None:
        """A job has ended here."""
        self._wanted.set()

    async def stop(self) -> None:
        """What is there goes through first; what cannot, waits in the store."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.wait({self._task})
        with contextlib.suppress(StoreAwayError):
            while await self.turn():
                pass

    async def turn(self) -> bool:
        """Some rows on their way. True when there may be more."""
        taken = await self._store.take_settled(self._owner, _MOST)
        if not taken:
            return False
        rows = [read_row(row.ledger_row) for row in taken if row.ledger_row]
        if rows and not await self._enter(rows):
            return False  # their lease lapses, and they are taken again
        await self._store.ack_settled(taken)
        self.rows += len(rows)
        return len(taken) == _MOST

    async def _run(self) -> None:
        while True:
            delay_s = _EVERY_S
            try:
                while await self.turn():
                    pass
            except StoreAwayError as error:
                _log.error("ledger rows of jobs wait for the queue's store: %s", error)
                delay_s = _RETRY_S
            except Exception:  # noqa: BLE001 - the next turn may do
                _log.exception("ledger rows of jobs wait through a bug")
                delay_s = _RETRY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._wanted.wait()
            self._wanted.clear()
            await asyncio.sleep(_SOON_S)
