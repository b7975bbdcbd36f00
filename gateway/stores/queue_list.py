"""Jobs of queue.db by page: a tenant's newest first, or a parent's children by position.

A cursor is the last row's number; one that cannot be read starts at the beginning.
"""

from gateway.overflow.job import LEASED, JobFilter
from gateway.stores.queue_schema import JobRow, job_rows
from gateway.stores.sqlite import Connection


def list_rows(
    connection: Connection, where: JobFilter, cursor: str | None, limit: int
) -> tuple[list[JobRow], str | None]:
    """The rows, and the cursor of the next page."""
    conditions: list[str] = []
    values: list[object] = []
    for column, value in (("tenant", where.tenant), ("parent", where.parent), ("lane", where.lane)):
        if value:
            conditions.append(f"{column} = ?")
            values.append(value)
    for column, several in (("door", where.doors), ("state", where.states)):
        if several:
            conditions.append(f"{column} IN ({', '.join('?' * len(several))})")
            values.extend(several)
    order, direction, beyond = ("position", "ASC", ">") if where.parent else ("seq", "DESC", "<")
    if cursor is not None and cursor.isdecimal() and len(cursor) < 19:
        conditions.append(f"{order} {beyond} ?")
        values.append(int(cursor))
    by = order
    if where.states and LEASED.issuperset(where.states) and not where.parent:
        # Workers ask every second: by the few that run, never through all that are kept.
        conditions.append("lease_until_time IS NOT NULL")
        by = f"+{order}"
    query = f"SELECT * FROM job WHERE {' AND '.join(conditions) or '1'} ORDER BY {by} {direction} LIMIT ?"  # noqa: S608 - own names
    rows = job_rows(connection, query, (*values, limit + 1))
    if len(rows) <= limit:
        return rows, None
    return rows[:limit], str(getattr(rows[limit - 1], order))
