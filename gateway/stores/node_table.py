"""What this node's ledger has to send, and what it has collected of others. Synchronous; knows no sink.

Invariant: rows collected and the position they move are written in one transaction.
"""

import logging
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

from gateway.ledger_row import COLUMNS, LedgerRow
from gateway.stores import ledger_table
from gateway.stores.ledger_sink import Entry
from gateway.stores.sqlite import Connection

_ROWS_AFTER: Final = (
    f"SELECT rowid, {', '.join(COLUMNS)} FROM ledger "  # noqa: S608 - own names
    "WHERE rowid > ? AND node = '' ORDER BY rowid LIMIT ?"
)


_log = logging.getLogger(__name__)


class Reader(NamedTuple):
    """Up to where the stream was read; empty: from its beginning."""

    epoch: str = ""
    entry_id: str = ""


def last_row(connection: Connection) -> int:
    """The rowid of this node's latest row; 0: none."""
    found = connection.execute(
        "SELECT rowid FROM ledger WHERE node = '' ORDER BY rowid DESC LIMIT 1"
    ).fetchone()
    return 0 if found is None else int(found[0])


def rows_after(connection: Connection, position: int, limit: int) -> tuple[int, list[LedgerRow]]:
    """This node's own rows that follow, in the order of their commit, and the position after the last of them."""
    found: list[tuple[Any, ...]] = connection.execute(_ROWS_AFTER, (position, limit)).fetchall()
    rows = [msgspec.convert(row[1:], LedgerRow, strict=False) for row in found]
    return (found[-1][0] if found else position), rows


def reader(connection: Connection) -> Reader:
    found = connection.execute("SELECT epoch, entry FROM ledger_reader").fetchone()
    return Reader() if found is None else Reader(*found)


def positions(connection: Connection) -> dict[str, int]:
    """Of every node something was collected of."""
    return dict(connection.execute("SELECT node, position FROM ledger_node"))


def collect(connection: Connection, own: str, entries: Sequence[Entry], now: Reader) -> dict[str, int]:
    """Enters the rows of other nodes, each once. Returns the nodes of which rows are missing, and after which.

    Of this node's `own` entries only the position is kept: where to go on, should the stream be lost.

    StorageError when the database cannot take them now.
    """
    known = positions(connection)
    missing: dict[str, int] = {}
    rows: list[LedgerRow] = []
    for entry in entries:
        position = known.get(entry.node, 0)
        if entry.node == own:
            known[own] = max(position, entry.position)
            continue
        if entry.after > position:
            missing[entry.node] = position
            continue
        rows.extend(msgspec.structs.replace(row, node=entry.node) for row in entry.rows)
        known[entry.node] = max(position, entry.position)

    def remember() -> None:
        connection.executemany("INSERT OR REPLACE INTO ledger_node VALUES (?, ?)", list(known.items()))
        connection.execute("INSERT OR REPLACE INTO ledger_reader VALUES (1, ?, ?)", now)

    try:
        ledger_table.insert(connection, rows, also=remember)
    except ledger_table.BadRowError:
        # Of another version, perhaps. The good ones must not wait for it.
        for row, reason in ledger_table.insert_possible(connection, rows).refused:
            _log.error("row %s of node %s was refused: %s", row.request_id, row.node, reason)
        ledger_table.insert(connection, (), also=remember)
    return missing
