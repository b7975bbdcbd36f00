"""What nobody ends otherwise, in queue.db: lapsed leases, what is too late, what is too old; and how many of each there are.

Inside a transaction of somebody else's, and no more than asked for at a time: others wait meanwhile.
"""

from typing import Any, Final, NamedTuple

from gateway.overflow.job import FINAL, QueueStats, Swept
from gateway.overflow.store import FORGET_S
from gateway.stores import queue_turns
from gateway.stores.queue_moves import count, expire, lose_owner
from gateway.stores.queue_parents import expire_parent, stop_children
from gateway.stores.queue_schema import SUSPECT, JobRow, find, job_rows, parent_row
from gateway.stores.sqlite import Connection

_DUE: Final = (
    "SELECT 1 FROM job WHERE lease_until_time <= ?1",
    "SELECT 1 FROM job WHERE due_time <= ?1",
    "SELECT 1 FROM parent WHERE is_stopping = 1 AND ?1",
    "SELECT 1 FROM parent WHERE due_time <= ?1",
    "SELECT 1 FROM outbox WHERE created_time <= ?1 - ?2",
)


class Sweeping(NamedTuple):
    """What was done, and files whose content is to go."""

    swept: Swept
    files: list[str]


def has_due(connection: Connection, now_time: float) -> bool:
    """Whether there is anything to sweep."""
    query = "SELECT " + " OR ".join(f"EXISTS ({each})" for each in _DUE)
    return bool(connection.execute(query, (now_time, FORGET_S)).get)


def sweep(connection: Connection, most: int, now_time: float) -> Sweeping:
    counts = dict.fromkeys(("requeued", "dead", "expired", "cancelled", "purged", "forgotten"), 0)
    files: list[str] = []
    lapsed = job_rows(connection, "SELECT * FROM job WHERE lease_until_time <= ? LIMIT ?", (now_time, most))
    for row in lapsed:
        if row.expires_time <= now_time and row.state != "cancelling":
            expire(connection, row, now_time)
        else:
            lose_owner(connection, row, now_time, "its lease lapsed")
        counts["requeued" if row.state == "queued" else row.state] += 1
    due = job_rows(connection, "SELECT * FROM job WHERE due_time <= ? LIMIT ?", (now_time, most))
    for row in due:
        counts[_end_of_time(connection, row, now_time, files)] += 1
    stopping = connection.execute("SELECT id FROM parent WHERE is_stopping = 1 LIMIT 1").get
    if stopping is not None:
        counts["cancelled"] += stop_children(connection, stopping, most, now_time)
    parents = connection.execute("SELECT * FROM parent WHERE due_time <= ? LIMIT ?", (now_time, most))
    for record in parents.fetchall():
        parent = parent_row(record)
        if parent.finished_time is None:
            expire_parent(connection, parent, now_time)
            counts["expired"] += 1
        elif now_time < parent.finished_time + parent.keep_s + FORGET_S:
            connection.execute(
                "UPDATE parent SET due_time = due_time + ? WHERE id = ?", (FORGET_S, parent.id)
            )
        else:
            connection.execute("DELETE FROM idempotency WHERE scope = ?", (parent.scope,))
            connection.execute("DELETE FROM parent WHERE id = ?", (parent.id,))
            counts["forgotten"] += 1
    connection.execute("DELETE FROM outbox WHERE created_time <= ?", (now_time - FORGET_S,))
    if counts["forgotten"] or counts["purged"]:
        queue_turns.forget_idle(connection)
    return Sweeping(Swept(**counts, is_all=not has_due(connection, now_time)), files)


def purge(
    connection: Connection, tenant: str, job_id: str, now_time: float
) -> tuple[JobRow | None, list[str]]:
    """The job as it stands then, and the files whose content is to go."""
    files: list[str] = []
    row = find(connection, job_id, tenant)
    if row is not None and row.state in FINAL and not row.is_purged:
        _end_of_time(connection, row, now_time, files)
        row = find(connection, job_id, tenant)
    return row, files


def _end_of_time(connection: Connection, row: JobRow, now_time: float, files: list[str]) -> str:
    """Expired, then purged, then forgotten; which it was."""
    if row.state not in FINAL:
        expire(connection, row, now_time)
        return "expired"
    if row.is_purged:
        connection.execute("DELETE FROM settled WHERE job_id = ?", (row.id,))
        connection.execute("DELETE FROM job WHERE seq = ?", (row.seq,))
        count(connection, "", row.state, -1)
        return "forgotten"
    file = connection.execute("SELECT file FROM result WHERE seq = ?", (row.seq,)).get
    if file:
        files.append(file)
    for table in ("payload", "result", "event"):
        connection.execute(f"DELETE FROM {table} WHERE seq = ?", (row.seq,))  # noqa: S608 - own names
    if row.scope is not None:
        connection.execute("DELETE FROM idempotency WHERE scope = ? AND subject = ?", (row.scope, row.id))
    connection.execute(
        "UPDATE job SET is_purged = 1, usage = x'', details = x'', due_time = ? WHERE seq = ?",
        (now_time + FORGET_S, row.seq),
    )
    return "purged"


def stats(connection: Connection, now_time: float) -> QueueStats:
    lanes = {
        line.removeprefix(SUSPECT)
        for (line,) in connection.execute(
            "SELECT DISTINCT line FROM share WHERE flex + batch + running + delayed > 0"
        )
    }
    due, waiting = connection.execute(
        "SELECT count(*) FILTER (WHERE next_time <= ?1), count(*) FILTER (WHERE next_time > ?1) "
        "FROM outbox WHERE next_time IS NOT NULL",
        (now_time,),
    ).get
    dead = connection.execute(
        "SELECT count(*) FROM outbox WHERE next_time IS NULL AND delivered_time IS NULL"
    ).get
    tally: list[tuple[Any, ...]] = connection.execute(
        "SELECT state, jobs FROM tally WHERE jobs > 0"
    ).fetchall()
    return QueueStats(
        lanes={lane: queue_turns.lane_stats(connection, lane, now_time) for lane in sorted(lanes)},
        states={str(s): n for s, n in tally},
        outbox_due=due,
        outbox_waiting=waiting,
        outbox_dead=dead,
        unsettled=connection.execute("SELECT count(*) FROM settled WHERE due_time IS NOT NULL").get,
        now_time=now_time,
    )
