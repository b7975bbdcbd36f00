"""The ledger's table: rows in, never changed.

Knows the columns, not what they mean. Invariant: a request id is in the table at most once, whoever inserts it
and however often.
"""

from collections.abc import Callable, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Final, NamedTuple

import apsw
import msgspec

from gateway.ledger_row import COLUMNS, LedgerRow
from gateway.stores.sqlite import Connection, explained

# Every statement gives the interpreter lock away and waits to have it back: many small ones cost the event loop,
# which gets it in between, more than they cost this thread. Binding so many holds it for some 50 us.
_ROWS_PER_STATEMENT: Final = 32


def _insert_of(rows: int) -> str:
    one = f"({', '.join('?' * len(COLUMNS))})"
    return (
        f"INSERT INTO ledger ({', '.join(COLUMNS)}) VALUES {', '.join([one] * rows)} "  # noqa: S608 - own names
        "ON CONFLICT (request_id) DO NOTHING"
    )


_INSERT: Final = _insert_of(1)
_INSERT_MANY: Final = _insert_of(_ROWS_PER_STATEMENT)


_BAD_ROW: Final = (
    apsw.ConstraintError,
    apsw.MismatchError,
    apsw.TooBigError,
    OverflowError,
    TypeError,
    ValueError,
)


class BadRowError(Exception):
    """A row itself is at fault, not the database: it will never go in."""


class Inserted(NamedTuple):
    """What became of a group of rows."""

    added: int
    refused: list[tuple[LedgerRow, str]]  # with the database's reason


def origin_of(connection: Connection, answer_id: str, team: str, key_id: str) -> tuple[str, int] | None:
    """Endpoint and session of the tenant's answer with this id; the tenant is the team, without one the key."""
    query = "SELECT endpoint, session_hash FROM ledger WHERE answer_id = ? AND answer_id != ''"
    whose = (" AND team = ?", team) if team else (" AND team = '' AND key_id = ?", key_id)
    for endpoint, session in connection.execute(query + whose[0] + " LIMIT 1", (answer_id, whose[1])):
        return str(endpoint), int(session)
    return None


def insert_possible(connection: Connection, rows: Sequence[LedgerRow]) -> Inserted:
    """Adds the rows, together if it can be, else one by one: a bad one must not hold up the good ones for ever."""
    try:
        return Inserted(insert(connection, rows), [])
    except BadRowError:
        added, refused = 0, []
        for row in rows:
            try:
                added += insert(connection, [row])
            except BadRowError as error:
                refused.append((row, str(error)))
        return Inserted(added, refused)


def insert(connection: Connection, rows: Sequence[LedgerRow], also: Callable[[], None] | None = None) -> int:
    """Adds those rows that are not there yet, in one transaction; returns how many those were.

    `also` is called inside of it. All or none. StorageError when the database cannot take them now, BadRowError when it never will.
    """
    with explained(Path(connection.filename)):
        connection.execute("BEGIN IMMEDIATE")
        try:
            before = connection.total_changes()
            records = map(msgspec.structs.astuple, rows)
            for _ in range(len(rows) // _ROWS_PER_STATEMENT):
                connection.execute(
                    _INSERT_MANY, tuple(chain.from_iterable(islice(records, _ROWS_PER_STATEMENT)))
                )
            connection.executemany(_INSERT, records)
            added = connection.total_changes() - before
            if also is not None:
                also()
            connection.execute("COMMIT")
        except BaseException as error:
            # SQLite has rolled back by itself after some errors (disk full among them).
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if isinstance(error, _BAD_ROW):
                raise BadRowError(str(error)) from error
            raise
    return added
