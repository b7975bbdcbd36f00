"""What the end of a job owes to others, in queue.db: rows for the ledger, news for webhooks.

Taken with a lease, ended by whoever has it. Knows bytes and times, not the ledger and not the web.
"""

from collections.abc import Sequence
from typing import Any, Final

from gateway.overflow.job import LEASE_S, OutboxRow, Settled
from gateway.stores.sqlite import Connection

_NEWS_S: Final = 2 * LEASE_S
_NEWS: Final = (
    "id, subject, tenant, door, is_parent, state, webhook, created_time, attempts, fence, next_time, "
    "delivered_time, error"
)


def take_settled(connection: Connection, owner: str, most: int, now_time: float) -> list[Settled]:
    taken: list[tuple[Any, ...]] = connection.execute(
        "SELECT job_id, state, ledger_row, reservation, fence + 1 FROM settled WHERE due_time <= ? "
        "ORDER BY due_time LIMIT ?",
        (now_time, most),
    ).fetchall()
    connection.executemany(
        "UPDATE settled SET owner = ?, fence = fence + 1, due_time = ? WHERE job_id = ?",
        [(owner, now_time + LEASE_S, record[0]) for record in taken],
    )
    return [
        Settled(job_id=job_id, state=state, ledger_row=row, reservation=reservation, fence=fence)
        for job_id, state, row, reservation, fence in taken
    ]


def ack_settled(connection: Connection, rows: Sequence[Settled]) -> list[str]:
    """The row stays until its job is forgotten, so that there is never a second one; its content goes."""
    acked = []
    for row in rows:
        connection.execute(
            "UPDATE settled SET due_time = NULL, ledger_row = x'', reservation = x'' "
            "WHERE job_id = ? AND fence = ? AND due_time IS NOT NULL",
            (row.job_id, row.fence),
        )
        if connection.changes():
            acked.append(row.job_id)
    return acked


def has_settled(connection: Connection, now_time: float) -> bool:
    return (
        connection.execute("SELECT 1 FROM settled WHERE due_time <= ? LIMIT 1", (now_time,)).get is not None
    )


def take_outbox(connection: Connection, owner: str, most: int, now_time: float) -> list[OutboxRow]:
    taken: list[tuple[Any, ...]] = connection.execute(
        f"SELECT {_NEWS} FROM outbox WHERE next_time <= ? ORDER BY next_time LIMIT ?",  # noqa: S608 - own names
        (now_time, most),
    ).fetchall()
    connection.executemany(
        "UPDATE outbox SET owner = ?, fence = fence + 1, next_time = ? WHERE id = ?",
        [(owner, now_time + _NEWS_S, record[0]) for record in taken],
    )
    return [_news(record, taken=1) for record in taken]


def has_news(connection: Connection, now_time: float) -> bool:
    return (
        connection.execute("SELECT 1 FROM outbox WHERE next_time <= ? LIMIT 1", (now_time,)).get is not None
    )


def _news(record: tuple[Any, ...], taken: int = 0) -> OutboxRow:
    values = dict(zip(_NEWS.split(", "), record, strict=True))
    values["is_parent"] = bool(values["is_parent"])
    values["fence"] += taken
    return OutboxRow(**values)


def delivered(connection: Connection, row: OutboxRow, now_time: float) -> None:
    connection.execute(
        "UPDATE outbox SET next_time = NULL, delivered_time = ?, error = '', owner = '' "
        "WHERE id = ? AND fence = ?",
        (now_time, row.id, row.fence),
    )


def failed(
    connection: Connection, row: OutboxRow, next_time: float | None, error: str, *, is_counted: bool
) -> None:
    """`next_time` None: it is not told again."""
    connection.execute(
        "UPDATE outbox SET attempts = attempts + ?, next_time = ?, error = ?, owner = '' "
        "WHERE id = ? AND fence = ? AND next_time IS NOT NULL",
        (int(is_counted), next_time, error, row.id, row.fence),
    )


def listed(connection: Connection, subject: str, most: int) -> list[OutboxRow]:
    where = "subject = ?1" if subject else "?1 = ''"
    query = f"SELECT {_NEWS} FROM outbox WHERE {where} ORDER BY created_time DESC, rowid DESC LIMIT ?2"  # noqa: S608 - own names
    return [_news(record) for record in connection.execute(query, (subject, most))]


def replay(connection: Connection, row_id: str, now_time: float) -> bool:
    """Its fence rises: a delivery that is under way ends nothing."""
    connection.execute(
        "UPDATE outbox SET next_time = ?, delivered_time = NULL, attempts = 0, fence = fence + 1, owner = '', "
        "error = '' WHERE id = ?",
        (now_time, row_id),
    )
    return connection.changes() == 1
