"""What is done with parents in queue.db: made, filled, released, cancelled, finished.

As `gateway.stores.queue_jobs`, inside a transaction of somebody else's. A parent's children are appended in order, so who
takes over from a dead owner knows where to go on.
"""

from collections.abc import Sequence
from typing import Final

from gateway.overflow.job import LEASE_S, NewParent, ParentLease, ParentState, TenantLimits
from gateway.overflow.store import LeaseLostError, OutOfOrderError
from gateway.stores import queue_turns
from gateway.stores.queue_jobs import Placed, Stored, check_caps, insert, job_bytes, subject_of
from gateway.stores.queue_moves import (
    End,
    end,
    end_parent,
    move,
    settle_parent,
    tell,
)
from gateway.stores.queue_schema import ParentRow, find_parent, job_rows, parent_row
from gateway.stores.sqlite import Connection

_AT_ONCE: Final = 100  # children cancelled with their parent; the sweep takes the others


def submit_all(
    connection: Connection, parent: NewParent, jobs: Sequence[Stored], limits: TenantLimits, now_time: float
) -> tuple[ParentRow, bool]:
    row, is_new = _make(connection, parent, "in_progress", now_time)
    if is_new:
        check_caps(connection, parent.tenant, limits, len(jobs), sum(job_bytes(each.job) for each in jobs))
        _put(connection, row, now_time, "")
        tell(connection, row, now_time, parent.announces, "queued", is_parent=True)
        _add(connection, row, jobs, now_time, is_staged=False)
        _weigh(connection, jobs, limits)
        row = find_parent(connection, row.id) or row
        settle_parent(connection, row, now_time)  # of no children
    return find_parent(connection, row.id) or row, is_new


def open_parent(
    connection: Connection, parent: NewParent, owner: str, now_time: float
) -> tuple[ParentRow, ParentLease | None]:
    row, is_new = _make(connection, parent, "validating", now_time)
    if not is_new:
        return row, None
    _put(connection, row, now_time, owner)
    return find_parent(connection, row.id) or row, ParentLease(row.id, 1, owner)


def _make(
    connection: Connection, parent: NewParent, state: ParentState, now_time: float
) -> tuple[ParentRow, bool]:
    """The parent as it will be, or the one from before."""
    key = parent.idempotency
    known = subject_of(connection, key.scope, key.fingerprint) if key is not None else None
    found = find_parent(connection, known or parent.id, parent.tenant)
    if found is not None:
        return found, False
    expires_time = now_time + parent.expires_in_s
    row = ParentRow(
        seq=0,
        id=parent.id,
        tenant=parent.tenant,
        key_id=parent.key_id,
        door=parent.door,
        state=state,
        is_finalized=int(parent.is_finalized),
        fence=1,
        owner="",
        lease_until_time=None,
        created_time=now_time,
        expires_time=expires_time,
        due_time=expires_time,
        keep_s=parent.keep_s,
        released_time=now_time if state == "in_progress" else None,
        settled_time=None,
        cancelled_time=None,
        finished_time=None,
        is_stopping=0,
        webhook=parent.webhook,
        details=parent.details,
        scope=None if key is None else key.scope,
        total=0,
        counts={},
    )
    if key is not None:
        connection.execute(
            "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?)", (key.scope, key.fingerprint, parent.id)
        )
    return row, True


_NAMES: Final = ParentRow.__struct_fields__[1:-1]
_INSERT: Final = f"INSERT INTO parent ({', '.join(_NAMES)}) VALUES ({', '.join('?' * len(_NAMES))})"  # noqa: S608 - own names


def _put(connection: Connection, row: ParentRow, now_time: float, owner: str) -> None:
    row.owner = owner
    row.lease_until_time = now_time + LEASE_S if owner else None
    connection.execute(_INSERT, tuple(getattr(row, name) for name in _NAMES))


def _add(
    connection: Connection, parent: ParentRow, jobs: Sequence[Stored], now_time: float, *, is_staged: bool
) -> None:
    state = "staged" if is_staged else "queued"
    for position, stored in enumerate(jobs, parent.total):
        placed = Placed(parent.id, position, "staged" if is_staged else "queued", parent.expires_time)
        insert(connection, stored, placed, now_time)
    connection.execute(
        f"UPDATE parent SET total = total + ?1, {state} = {state} + ?1 WHERE id = ?2",  # noqa: S608 - own names
        (len(jobs), parent.id),
    )


def _weigh(connection: Connection, jobs: Sequence[Stored], limits: TenantLimits) -> None:
    for lane, tenant in {(each.job.lane, each.job.tenant) for each in jobs}:
        queue_turns.weigh(connection, lane, tenant, limits.weight)


def held_parent(connection: Connection, lease: ParentLease, state: str) -> ParentRow:
    """The parent in this state, if the lease is its newest. LeaseLostError else."""
    row = find_parent(connection, lease.parent_id)
    if row is None or (row.fence, row.owner, row.state) != (lease.fence, lease.owner, state):
        raise LeaseLostError(lease.parent_id)
    return row


def renew_parent(connection: Connection, lease: ParentLease, now_time: float) -> None:
    connection.execute(
        "UPDATE parent SET lease_until_time = ? WHERE id = ? AND fence = ? AND owner = ? "
        "AND state IN ('validating', 'finalizing')",
        (now_time + LEASE_S, lease.parent_id, lease.fence, lease.owner),
    )
    if not connection.changes():
        raise LeaseLostError(lease.parent_id)


def append_children(
    connection: Connection,
    lease: ParentLease,
    first: int,
    jobs: Sequence[Stored],
    limits: TenantLimits,
    now_time: float,
) -> ParentRow:
    row = held_parent(connection, lease, "validating")
    if first != row.total:
        raise OutOfOrderError(row.total)
    check_caps(connection, row.tenant, limits, len(jobs), sum(job_bytes(each.job) for each in jobs))
    _add(connection, row, jobs, now_time, is_staged=True)
    renew_parent(connection, lease, now_time)
    return find_parent(connection, row.id) or row


def release_parent(connection: Connection, lease: ParentLease, most: int, now_time: float) -> int:
    """How many are left."""
    parent = held_parent(connection, lease, "validating")
    records = job_rows(
        connection,
        "SELECT * FROM job WHERE parent = ? AND state = 'staged' ORDER BY position LIMIT ?",
        (parent.id, most),
    )
    for row in records:
        move(connection, row, "queued", now_time, "released", queued_time=now_time)
    left = parent.counts.get("staged", 0) - len(records)
    if left:
        renew_parent(connection, lease, now_time)
        return left
    connection.execute(
        "UPDATE parent SET state = 'in_progress', released_time = ?, lease_until_time = NULL WHERE id = ?",
        (now_time, parent.id),
    )
    parent = find_parent(connection, parent.id) or parent
    settle_parent(connection, parent, now_time)  # they may have ended already
    return 0


def fail_parent(connection: Connection, lease: ParentLease, details: bytes, now_time: float) -> ParentRow:
    row = find_parent(connection, lease.parent_id)
    if row is not None and row.state == "failed" and (row.fence, row.owner) == (lease.fence, lease.owner):
        return row
    row = held_parent(connection, lease, "validating")
    connection.execute("UPDATE parent SET details = ? WHERE id = ?", (details, row.id))
    end_parent(connection, row, "failed", now_time)
    return find_parent(connection, row.id) or row


_IDLE: Final = (
    "FROM parent WHERE door = ? AND state IN ('validating', 'finalizing') "
    "AND (lease_until_time IS NULL OR lease_until_time <= ?) ORDER BY seq LIMIT 1"
)


def has_work(connection: Connection, door: str, now_time: float) -> bool:
    return connection.execute("SELECT 1 " + _IDLE, (door, now_time)).get is not None


def claim_parent(
    connection: Connection, owner: str, door: str, now_time: float
) -> tuple[ParentRow, ParentLease] | None:
    record = connection.execute("SELECT id, fence " + _IDLE, (door, now_time)).get
    if record is None:
        return None
    parent_id, fence = record
    connection.execute(
        "UPDATE parent SET owner = ?, fence = fence + 1, lease_until_time = ? WHERE id = ?",
        (owner, now_time + LEASE_S, parent_id),
    )
    row = find_parent(connection, parent_id)
    return None if row is None else (row, ParentLease(parent_id, fence + 1, owner))


def finish_parent(
    connection: Connection, lease: ParentLease, state: ParentState, details: bytes, now_time: float
) -> ParentRow:
    row = find_parent(connection, lease.parent_id)
    if row is not None and row.finished_time and (row.fence, row.owner) == (lease.fence, lease.owner):
        return row
    row = held_parent(connection, lease, "finalizing")
    connection.execute("UPDATE parent SET details = ? WHERE id = ?", (details, row.id))
    end_parent(connection, row, state, now_time)
    return find_parent(connection, row.id) or row


def cancel_parent(connection: Connection, tenant: str, parent_id: str, now_time: float) -> ParentRow | None:
    row = find_parent(connection, parent_id, tenant)
    if row is None or row.state not in {"validating", "in_progress"}:
        return row
    connection.execute(
        "UPDATE parent SET state = 'cancelling', cancelled_time = ?, is_stopping = 1, lease_until_time = NULL "
        "WHERE id = ?",
        (now_time, row.id),
    )
    running = job_rows(
        connection,
        "SELECT * FROM job INDEXED BY job_leased WHERE lease_until_time IS NOT NULL AND parent = ? "
        "AND state = 'running'",
        (row.id,),
    )
    for child in running:
        move(connection, child, "cancelling", now_time, "its parent was cancelled")
    stop_children(connection, row.id, _AT_ONCE, now_time)
    row = find_parent(connection, row.id) or row
    settle_parent(connection, row, now_time)  # it may have had none
    return find_parent(connection, row.id)


def stop_children(connection: Connection, parent_id: str, most: int, now_time: float) -> int:
    """Cancels children that nobody started, up to so many; how many they were."""
    records = job_rows(
        connection,
        "SELECT * FROM job WHERE parent = ? AND state IN ('staged', 'queued') LIMIT ?",
        (parent_id, most),
    )
    for row in records:
        end(connection, row, End("cancelled", "its parent was"), now_time)
    if len(records) < most:
        connection.execute("UPDATE parent SET is_stopping = 0 WHERE id = ?", (parent_id,))
    return len(records)


def expire_parent(connection: Connection, parent: ParentRow, now_time: float) -> None:
    """Its time is over. Children have no more of it than their parent, so only one that was never released ends so."""
    if parent.state == "validating":
        end_parent(connection, parent, "expired", now_time)
    else:
        connection.execute("UPDATE parent SET due_time = NULL WHERE id = ?", (parent.id,))


def listed(
    connection: Connection, tenant: str, door: str, after: str, limit: int
) -> tuple[list[ParentRow], bool]:
    before = None if not after else find_parent(connection, after, tenant)
    query = "SELECT * FROM parent WHERE door = ?1 AND seq < ?2 {} ORDER BY seq DESC LIMIT ?3"
    query = query.format("AND tenant = ?4" if tenant else "AND ?4 = ''")
    seq = 2**62 if before is None else before.seq
    rows = [parent_row(r) for r in connection.execute(query, (door, seq, limit + 1, tenant))]
    return rows[:limit], len(rows) > limit
