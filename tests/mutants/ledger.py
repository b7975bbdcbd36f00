"""Broken builds of the ledger that its kill test must catch. Loaded by that test only."""

import time

from gateway.intents import Intents
from gateway.ledger import Ledger


def frees_before_commit() -> None:
    """The slot is given back as soon as the row waits in memory."""
    close = Ledger.close

    def broken(self: Ledger, row) -> None:
        close(self, row)
        slot = self._rows[-1][1]
        self._rows[-1] = (row, -1)
        self._intents.free([slot])

    Ledger.close = broken


def settles_in_memory_only() -> None:
    """The row is not written beside its intent."""
    Intents.settle = lambda self, slot, row: slot


def overwrites_the_intent() -> None:
    """The row takes the place of the intent: for a moment neither is whole."""
    settle = Intents.settle

    def torn(self: Intents, slot: int, row) -> int:
        self._map[slot : slot + 8] = bytes(8)
        time.sleep(0.0005)  # the moment, drawn out so that a few kills hit it
        return settle(self, slot, row)

    Intents.settle = torn


def opens_no_intent() -> None:
    """The request is on disk only once it has ended."""
    Ledger.open = lambda self, exchange: None


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (frees_before_commit, settles_in_memory_only, overwrites_the_intent, opens_no_intent)
}
