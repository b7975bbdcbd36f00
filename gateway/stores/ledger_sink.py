"""Where ledger rows of several nodes meet: the contract of a sink, and what passes through it.

A sink keeps each node's rows in order and its position, the rowid of the last row it has taken from that node. Taking
rows and moving the position is one step, so a node that is killed anywhere goes on where the sink says. A reader
gets entries, may get one twice, and asks for rows again that it missed.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from gateway.ledger_row import LedgerRow


class Entry(NamedTuple):
    """Rows of a node that follow its row `after`, up to its row `position`. `id` orders the entries of one epoch."""

    id: str
    node: str
    after: int
    position: int
    rows: Sequence[LedgerRow]


class Taken(NamedTuple):
    """`position` is what to go on from, whether or not these rows were taken."""

    position: int
    is_taken: bool


class OtherShipperError(Exception):
    """Somebody else ships rows under this node's name."""


class LedgerSink(Protocol):
    """One per node. StoreAwayError from every method: nobody knows whether it was done, and repeating it is safe."""

    async def take(self, after: int, position: int, rows: Sequence[LedgerRow]) -> Taken:
        """Rows of this node that follow its row `after`; without rows, only says the position."""

    async def read(self, epoch: str, entry_id: str, limit: int) -> tuple[str, list[Entry]]:
        """The epoch, and entries after this one; from the first, if the epoch is another."""

    async def positions(self) -> dict[str, int]:
        """Of every node that ever had rows here."""

    async def want(self, node: str, position: int) -> None:
        """The node is to send its rows after this one again."""

    async def close(self) -> None: ...
