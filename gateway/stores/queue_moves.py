"""Transitions of a job in queue.db, and all that each of them entails.

Everything here happens inside a transaction that somebody else begins and commits. Invariant: only `move` changes a job's
state, and it changes with it what is counted of it: turns, its tenant's load, the tally, its parent's counts. Only `end` leads to a
final state. Knows no asyncio and no bodies.
"""

import secrets
from typing import Any, Final, NamedTuple

from gateway.overflow.job import DEATHS_DEAD, DEATHS_SUSPECT, FINAL, Lease, State
from gateway.overflow.store import LeaseLostError
from gateway.stores import queue_turns
from gateway.stores.queue_schema import SUSPECT, JobRow, ParentRow, find, find_parent
from gateway.stores.sqlite import Connection

_HISTORY_CHARACTERS: Final = 4000  # releases are not counted; the end is always written
_OPEN: Final = ("staged", "queued", "running", "cancelling")
_UNLEASED: Final[dict[str, Any]] = {"owner": "", "lease_until_time": None}


class End(NamedTuple):
    """How a job ends. `owner`: who ended it by its own lease; "": somebody else did."""

    state: State
    reason: str
    error: str = ""
    ledger_row: bytes = b""
    owner: str = ""
    status: int = 0
    result_bytes: int = 0
    units: int | None = 0
    cost_nanousd: int | None = None
    usage: bytes = b""


def held(connection: Connection, lease: Lease) -> JobRow:
    """The job, if the lease is its newest one and still stands. LeaseLostError else."""
    row = find(connection, lease.job_id)
    if row is None or not is_held(row, lease):
        raise LeaseLostError(lease.job_id)
    return row


def is_held(row: JobRow, lease: Lease) -> bool:
    """The fence: whoever does not have the newest lease may change nothing."""
    return row.is_leased and row.fence == lease.fence and row.owner == lease.owner


def move(
    connection: Connection, row: JobRow, state: State, now_time: float, reason: str, **changes: Any
) -> None:
    """The job is in `state` now, with these columns changed; `row` is, too."""
    before, was_waiting, turn = row.state, row.is_waiting, queue_turns.turn_of(row)
    for name, value in changes.items():
        setattr(row, name, value)
    row.state = state
    if state in FINAL or len(row.history) < _HISTORY_CHARACTERS:
        row.history += f"{now_time:.6f} {state} {row.fence} {row.owner or '-'} {reason}\n"
    columns = {"state": state, "history": row.history, **changes}
    names = ", ".join(f"{name} = ?" for name in columns)
    connection.execute(f"UPDATE job SET {names} WHERE seq = ?", (*columns.values(), row.seq))  # noqa: S608 - own names
    queue_turns.shift(connection, row.tenant, turn, queue_turns.turn_of(row))
    if was_waiting != row.is_waiting:
        sign = 1 if row.is_waiting else -1
        bear(connection, row.tenant, sign, sign * row.body_bytes)
    if before != state:
        count(connection, before, state)
        if row.parent:
            child_moved(connection, row.parent, (before, state), now_time)


def bear(connection: Connection, tenant: str, jobs: int, size: int) -> None:
    """The tenant has so much more waiting, or less."""
    connection.execute(
        "INSERT INTO load VALUES (?1, ?2, ?3) "
        "ON CONFLICT (tenant) DO UPDATE SET jobs = jobs + ?2, bytes = bytes + ?3",
        (tenant, jobs, size),
    )


def count(connection: Connection, before: str, after: str, jobs: int = 1) -> None:
    """In the tally; "" is nowhere."""
    connection.execute(
        "UPDATE tally SET jobs = jobs + CASE state WHEN ?1 THEN -?3 ELSE ?3 END WHERE state IN (?1, ?2)",
        (before, after, jobs),
    )


def end(connection: Connection, row: JobRow, how: End, now_time: float) -> None:
    """The job's last transition, with its Settled row and its news."""
    if row.is_leased:
        units = row.charged if how.units is None else how.units
        queue_turns.charge(connection, row, units - row.charged)
        queue_turns.count_finish(connection, row.line, now_time)
    move(
        connection,
        row,
        how.state,
        now_time,
        how.reason,
        owner=how.owner,
        lease_until_time=None,
        not_before_time=None,
        charged=0,
        finished_time=now_time,
        due_time=now_time + row.keep_s,
        error=how.error or row.error,
        status=how.status,
        result_bytes=how.result_bytes,
        cost_nanousd=how.cost_nanousd,
        usage=how.usage,
    )
    reservation = connection.execute("SELECT reservation FROM payload WHERE seq = ?", (row.seq,)).get
    if how.ledger_row or reservation:
        connection.execute(
            "INSERT INTO settled (job_id, state, ledger_row, reservation, due_time) VALUES (?, ?, ?, ?, ?)",
            (row.id, how.state, how.ledger_row, reservation or b"", now_time),
        )
    if how.state != "dead":  # a dead one may be replayed
        connection.execute("DELETE FROM payload WHERE seq = ?", (row.seq,))
    if row.webhook:
        tell(connection, row, now_time, row.webhook, row.state, is_parent=False)


def tell(
    connection: Connection,
    row: JobRow | ParentRow,
    now_time: float,
    webhooks: str,
    state: str,
    *,
    is_parent: bool,
) -> None:
    """Each of these webhooks is to hear of the state it is in."""
    connection.executemany(
        "INSERT INTO outbox (id, subject, tenant, door, is_parent, state, webhook, created_time, next_time) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [
            (
                f"msg_{secrets.token_hex(16)}",
                row.id,
                row.tenant,
                row.door,
                int(is_parent),
                state,
                webhook,
                now_time,
                now_time,
            )
            for webhook in webhooks.split()
        ],
    )


def requeue(connection: Connection, row: JobRow, now_time: float, reason: str, **changes: Any) -> None:
    """Back to its place, its charge undone; a lease that was cancelled meanwhile ends as that."""
    if row.state == "cancelling":
        end(connection, row, End("cancelled", reason), now_time)
        return
    queue_turns.charge(connection, row, -row.charged)
    move(connection, row, "queued", now_time, reason, **_UNLEASED, charged=0, **changes)


def lose_owner(connection: Connection, row: JobRow, now_time: float, reason: str) -> str:
    """Whoever had it is gone. The state it is in then."""
    deaths = row.deaths + 1
    if row.state == "cancelling":
        end(connection, row, End("cancelled", reason), now_time)
    elif deaths >= DEATHS_DEAD:
        row.deaths = deaths
        connection.execute("UPDATE job SET deaths = ? WHERE seq = ?", (deaths, row.seq))
        error = f"{deaths} processes died while they ran it"
        end(connection, row, End("dead", reason, error, units=None), now_time)
    else:
        line = SUSPECT + row.lane if deaths >= DEATHS_SUSPECT else row.line
        requeue(connection, row, now_time, reason, deaths=deaths, line=line)
    return row.state


def expire(connection: Connection, row: JobRow, now_time: float) -> None:
    end(connection, row, End("expired", "too late", "nobody could run it in time"), now_time)


def child_moved(
    connection: Connection, parent_id: str, states: tuple[str, str], now_time: float, jobs: int = 1
) -> None:
    """So many children went from one state to another; the last one that ends takes the parent with it."""
    before, after = states
    connection.execute(
        f"UPDATE parent SET {before} = {before} - ?1, {after} = {after} + ?1 WHERE id = ?2",  # noqa: S608 - own names
        (jobs, parent_id),
    )
    if after in FINAL:
        parent = find_parent(connection, parent_id)
        if parent is not None:
            settle_parent(connection, parent, now_time)


def settle_parent(connection: Connection, parent: ParentRow, now_time: float) -> None:
    """Once all children have ended: its door's turn, or its end."""
    if parent.state not in {"in_progress", "cancelling"} or any(state in parent.counts for state in _OPEN):
        return
    parent.settled_time = now_time
    connection.execute(
        "UPDATE parent SET settled_time = ?, is_stopping = 0, owner = '', lease_until_time = NULL WHERE id = ?",
        (now_time, parent.id),
    )
    if parent.is_finalized:
        parent.state = "finalizing"
        connection.execute("UPDATE parent SET state = 'finalizing' WHERE id = ?", (parent.id,))
        return
    if parent.cancelled_time is not None:
        state = "cancelled"
    elif parent.counts.get("expired") and parent.expires_time <= now_time:
        state = "expired"
    else:
        state = "completed"
    end_parent(connection, parent, state, now_time)


def end_parent(connection: Connection, parent: ParentRow, state: str, now_time: float) -> None:
    """Its last transition, with its news. Children that nobody started are cancelled by and by."""
    is_stopping = int(any(parent.counts.get(state) for state in ("staged", "queued")))
    connection.execute(
        "UPDATE parent SET state = ?, finished_time = ?, due_time = ?, is_stopping = ?, lease_until_time = NULL "
        "WHERE id = ?",
        (state, now_time, now_time + parent.keep_s, is_stopping, parent.id),
    )
    parent.state, parent.finished_time = state, now_time
    if parent.webhook:
        tell(connection, parent, now_time, parent.webhook, parent.state, is_parent=True)
