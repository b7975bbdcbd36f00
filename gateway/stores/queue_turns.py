"""Whose turn it is: virtual time per tenant and line, and the counters that make a claim cheap.

Of the tenants that have something ready the one with the least weighted service goes first; the estimate is charged at the
claim and corrected at the end. One that returns starts where the others stand: nothing is saved up by being idle. All
of it is kept in counters, so a claim looks at a handful of rows however long the queue is. Knows no leases.
"""

import math
from typing import Any, Final, NamedTuple

from gateway.overflow.job import AGEING_S, LaneStats
from gateway.stores.queue_schema import SUSPECT, JobRow, job_rows
from gateway.stores.sqlite import Connection

# Of so many claims at least one is a batch job's, where there is one: 5 %.
BATCH_EVERY: Final = 20
_RUNNING_SHARE: Final = 0.5
# No more tenants than this can be over half of what runs.
_LOOKED_AT: Final = 4
_RATE_S: Final = 60.0


class Delta(NamedTuple):
    """What a transition changes of its tenant's share."""

    flex: int = 0
    batch: int = 0
    running: int = 0
    delayed: int = 0


def turn_of(row: JobRow) -> tuple[str, Delta]:
    """The line it is in, and what it counts for there, as it stands."""
    if row.is_leased:
        return row.line, Delta(running=1)
    if row.state != "queued":
        return row.line, Delta()
    if row.not_before_time is not None:
        return row.line, Delta(delayed=1)
    return row.line, Delta(batch=1) if row.job_class else Delta(flex=1)


def shift(
    connection: Connection, tenant: str, before: tuple[str, Delta], after: tuple[str, Delta], jobs: int = 1
) -> None:
    """So many of the tenant's jobs counted as `before`, and count as `after` now."""
    if before == after:
        return
    if before[0] == after[0]:
        change = Delta(*(jobs * (new - old) for old, new in zip(before[1], after[1], strict=True)))
        _add(connection, after[0], tenant, change)
        return
    _add(connection, before[0], tenant, Delta(*(-jobs * units for units in before[1])))
    _add(connection, after[0], tenant, Delta(*(jobs * units for units in after[1])))


def _add(connection: Connection, line: str, tenant: str, delta: Delta) -> None:
    if not any(delta):
        return
    if delta.flex + delta.batch > 0:
        # Whoever had nothing here starts at the least service of those that wait.
        connection.execute("INSERT INTO line (line) VALUES (?) ON CONFLICT (line) DO NOTHING", (line,))
        connection.execute(
            "INSERT INTO share (line, tenant, vt, flex, batch, running, delayed) "
            "VALUES (?1, ?2, (SELECT floor FROM line WHERE line = ?1), ?3, ?4, ?5, ?6) "
            "ON CONFLICT (line, tenant) DO UPDATE SET "
            "vt = CASE WHEN flex + batch + running > 0 THEN vt ELSE max(vt, excluded.vt) END, flex = flex + ?3, "
            "batch = batch + ?4, running = running + ?5, delayed = delayed + ?6",
            (line, tenant, *delta),
        )
    else:
        connection.execute(
            "UPDATE share SET flex = flex + ?3, batch = batch + ?4, running = running + ?5, "
            "delayed = delayed + ?6 WHERE line = ?1 AND tenant = ?2",
            (line, tenant, *delta),
        )
    if delta.running:
        connection.execute("UPDATE line SET running = running + ? WHERE line = ?", (delta.running, line))


def weigh(connection: Connection, line: str, tenant: str, weight: float) -> None:
    """The tenant's weight from now on."""
    connection.execute(
        "UPDATE share SET weight = ?3 WHERE line = ?1 AND tenant = ?2 AND weight != ?3",
        (line, tenant, weight),
    )


def charge(connection: Connection, row: JobRow, units: int) -> None:
    """The tenant was served so much more, or less."""
    if units:
        connection.execute(
            "UPDATE share SET vt = vt + ?3 / weight WHERE line = ?1 AND tenant = ?2",
            (row.line, row.tenant, float(units)),
        )


def has_ready(connection: Connection, line: str, now_time: float) -> bool:
    """Whether a claim might find something."""
    query = "SELECT 1 FROM share WHERE line = ? AND flex + batch > 0 LIMIT 1"
    if connection.execute(query, (line,)).get is not None:
        return True
    query = "SELECT 1 FROM job WHERE not_before_time <= ? LIMIT 1"
    return connection.execute(query, (now_time,)).get is not None


def pick(connection: Connection, line: str, now_time: float) -> JobRow | None:
    """The job whose turn it is."""
    record: Any = connection.execute("SELECT since_batch, running FROM line WHERE line = ?", (line,)).get
    if record is None:
        return None
    since_batch, running = record
    if since_batch >= BATCH_EVERY - 1:
        tenant = _tenant(connection, line, "batch > 0", running)
        if tenant is not None:
            return _head(connection, line, tenant, 1)
    tenant = _tenant(connection, line, "flex + batch > 0", running)
    if tenant is None:
        return None
    flex, batch = _head(connection, line, tenant, 0), _head(connection, line, tenant, 1)
    if flex is None or batch is None:
        return flex or batch
    has_aged = batch.queued_time + AGEING_S <= now_time
    return batch if has_aged and batch.queued_time < flex.queued_time else flex


def _tenant(connection: Connection, line: str, which: str, running: int) -> str | None:
    """The one with the least service, passing over who has more than half of what runs."""
    first = None
    query = f"SELECT tenant, running FROM share WHERE line = ? AND {which} ORDER BY vt LIMIT {_LOOKED_AT}"  # noqa: S608 - own words
    shares: list[tuple[Any, ...]] = connection.execute(query, (line,)).fetchall()
    for tenant, own in shares:
        if own + 1 <= _RUNNING_SHARE * (running + 1):
            return str(tenant)
        first = first or str(tenant)
    return first


def _head(connection: Connection, line: str, tenant: str, job_class: int) -> JobRow | None:
    query = (
        "SELECT * FROM job WHERE state = 'queued' AND not_before_time IS NULL "
        "AND line = ? AND tenant = ? AND class = ? ORDER BY seq LIMIT 1"
    )
    return next(iter(job_rows(connection, query, (line, tenant, job_class))), None)


def served(connection: Connection, row: JobRow) -> None:
    """The job was claimed, and its estimate not charged yet: where the others start, and when a batch job is next."""
    connection.execute(
        "UPDATE line SET since_batch = CASE WHEN ?3 THEN 0 ELSE since_batch + 1 END, "
        "floor = max(floor, (SELECT vt FROM share WHERE line = ?1 AND tenant = ?2)) WHERE line = ?1",
        (row.line, row.tenant, row.job_class),
    )


def count_finish(connection: Connection, line: str, now_time: float) -> None:
    """For the rate that an estimated wait is made of."""
    record: Any = connection.execute("SELECT rate, rate_time FROM line WHERE line = ?", (line,)).get
    if record is not None:
        rate, rate_time = record
        rate = _decayed(rate, rate_time, now_time) + 1 / _RATE_S
        connection.execute("UPDATE line SET rate = ?, rate_time = ? WHERE line = ?", (rate, now_time, line))


def _decayed(rate: float, rate_time: float, now_time: float) -> float:
    return rate * math.exp(-max(0.0, now_time - rate_time) / _RATE_S)


def lane_stats(connection: Connection, lane: str, now_time: float) -> LaneStats:
    """A lane and its suspects."""
    lines = (lane, SUSPECT + lane)
    sums = "coalesce(sum(flex), 0), coalesce(sum(batch), 0), coalesce(sum(running), 0), coalesce(sum(delayed), 0)"
    flex, batch, running, delayed, tenants = connection.execute(
        f"SELECT {sums}, count(*) FILTER (WHERE flex + batch > 0) FROM share WHERE line IN (?, ?)",  # noqa: S608 - own words
        lines,
    ).get
    solitary = connection.execute(
        "SELECT coalesce(sum(flex + batch + delayed), 0) FROM share WHERE line = ?", (SUSPECT + lane,)
    ).get
    rates: Any = connection.execute("SELECT rate, rate_time FROM line WHERE line IN (?, ?)", lines)
    return LaneStats(
        queued=flex + batch + delayed,
        delayed=delayed,
        solitary=solitary,
        queued_flex=flex,
        queued_batch=batch,
        running=running,
        tenants=tenants,
        oldest_queued_time=_oldest(connection, lane),
        finished_per_s=sum(_decayed(rate, rate_time, now_time) for rate, rate_time in rates),
    )


def _oldest(connection: Connection, lane: str) -> float | None:
    """Of the tenants' first ones."""
    query = "SELECT tenant FROM share WHERE line = ? AND flex + batch > 0 ORDER BY vt DESC LIMIT 100"
    heads = [
        head.queued_time
        for (tenant,) in connection.execute(query, (lane,)).fetchall()
        for job_class in (0, 1)
        if (head := _head(connection, lane, str(tenant), job_class)) is not None
    ]
    return min(heads, default=None)


def ahead(connection: Connection, row: JobRow) -> int:
    """How many jobs fair turns would claim before this one that is queued: its tenant's own, and as many of each other's."""
    query = (
        "SELECT count(*) FROM (SELECT 1 FROM job WHERE state = 'queued' AND not_before_time IS NULL "
        "AND line = ? AND tenant = ? AND class = ? AND seq < ? LIMIT 100000)"
    )
    own: int = connection.execute(query, (row.line, row.tenant, row.job_class, row.seq)).get
    if row.job_class:
        query = "SELECT flex FROM share WHERE line = ? AND tenant = ?"
        own += connection.execute(query, (row.line, row.tenant)).get or 0
    query = (
        "SELECT coalesce(sum(min(flex + batch, ?3)), 0) FROM share "
        "WHERE line = ?1 AND tenant != ?2 AND flex + batch > 0"
    )
    others: int = connection.execute(query, (row.line, row.tenant, own + 1)).get
    return own + others


def forget_idle(connection: Connection) -> None:
    """Tenants that have nothing here and would start where a new one does."""
    connection.execute(
        "DELETE FROM share WHERE flex + batch + running + delayed = 0 "
        "AND vt <= (SELECT floor FROM line WHERE line.line = share.line)"
    )
