"""What is done with jobs in queue.db, an operation a function: handed in, claimed, renewed, ended, cancelled, replayed.

Each runs inside a transaction of `gateway.stores.queue_thread`; it refuses before it changes anything. Bodies come in as they
are to be stored, so that nobody compresses while the database is locked.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from gateway.overflow.job import FINAL, LEASE_S, Failure, Lease, NewJob, Outcome, State, TenantLimits, new_id
from gateway.overflow.store import IdempotencyConflictError, LeaseLostError, OutOfOrderError, QueueFullError
from gateway.stores import queue_turns
from gateway.stores.queue_moves import (
    End,
    bear,
    count,
    end,
    expire,
    held,
    is_held,
    lose_owner,
    move,
    requeue,
)
from gateway.stores.queue_schema import CLASSES, SUSPECT, JobRow, find, job_rows
from gateway.stores.sqlite import Connection

_SKIPPED: Final = 100  # that have expired or whose parent was cancelled, at one claim
_PROMOTED: Final = 50
_STOPPED: Final = frozenset({"cancelling", "failed", "cancelled", "expired"})


class Stored(NamedTuple):
    """A new job with its content as it is stored."""

    job: NewJob
    body: bytes
    headers: bytes


class Placed(NamedTuple):
    """Where a child belongs."""

    parent: str = ""
    position: int = 0
    state: State = "queued"
    expires_time: float | None = None  # its parent's


class Answer(NamedTuple):
    """A result as it is stored: inline, or in a file of this name."""

    status: int
    size: int
    headers: bytes
    body: bytes
    file: str = ""


class Run(NamedTuple):
    """A claimed job and its stored content."""

    row: JobRow
    body: bytes
    headers: bytes
    caller: bytes
    reservation: bytes
    carried: bytes


def subject_of(connection: Connection, scope: bytes, fingerprint: bytes) -> str | None:
    """The id that this idempotency key made before."""
    record = connection.execute("SELECT fingerprint, subject FROM idempotency WHERE scope = ?", (scope,)).get
    if record is None:
        return None
    if record[0] != fingerprint:
        raise IdempotencyConflictError("the key was used with other content")
    return str(record[1])


def submit(
    connection: Connection, stored: Stored, limits: TenantLimits, now_time: float
) -> tuple[JobRow, bool]:
    """The job, and whether it is new."""
    job = stored.job
    key = job.idempotency
    known = subject_of(connection, key.scope, key.fingerprint) if key is not None else None
    row = find(connection, known or job.id, job.tenant)
    if row is not None:
        return row, False
    check_caps(connection, job.tenant, limits, 1, job_bytes(job))
    row = insert(connection, stored, Placed(), now_time)
    queue_turns.weigh(connection, row.line, row.tenant, limits.weight)
    if key is not None:
        connection.execute(
            "INSERT OR REPLACE INTO idempotency VALUES (?, ?, ?)", (key.scope, key.fingerprint, job.id)
        )
    return row, True


def check_caps(connection: Connection, tenant: str, limits: TenantLimits, jobs: int, size: int) -> None:
    """QueueFullError when so much more would be too much."""
    if not (limits.queued_jobs or limits.queued_bytes):
        return
    record = connection.execute("SELECT jobs, bytes FROM load WHERE tenant = ?", (tenant,)).get
    waiting, waiting_bytes = record or (0, 0)
    is_over = limits.queued_jobs and waiting + jobs > limits.queued_jobs
    if is_over or (limits.queued_bytes and waiting_bytes + size > limits.queued_bytes):
        raise QueueFullError(waiting, waiting_bytes)


def job_bytes(job: NewJob) -> int:
    return len(job.body) + len(job.headers)


def insert(connection: Connection, stored: Stored, placed: Placed, now_time: float) -> JobRow:
    """A new job, counted; its parent's counts are the caller's to change."""
    job = stored.job
    expires_time = now_time + job.expires_in_s
    if placed.expires_time is not None:
        expires_time = min(expires_time, placed.expires_time)
    row = JobRow(
        seq=0,
        id=job.id,
        tenant=job.tenant,
        key_id=job.key_id,
        lane=job.lane,
        line=job.lane,
        model=job.model,
        path=job.path,
        door=job.door,
        job_class=CLASSES.index(job.job_class),
        is_stream=int(job.is_stream),
        state=placed.state,
        fence=0,
        attempts=0,
        max_attempts=job.max_attempts,
        runs=0,
        deaths=0,
        submitted_time=now_time,
        queued_time=now_time,
        expires_time=expires_time,
        due_time=expires_time,
        keep_s=job.keep_s,
        body_bytes=job_bytes(job),
        estimate=max(1, job.estimate),
        charged=0,
        started_time=None,
        finished_time=None,
        not_before_time=None,
        owner="",
        lease_until_time=None,
        parent=placed.parent,
        position=placed.position,
        reference=job.reference,
        webhook=job.webhook,
        status=0,
        result_bytes=0,
        error="",
        cost_nanousd=None,
        usage=b"",
        details=job.details,
        replay_of="",
        replayed_as="",
        is_purged=0,
        events=0,
        scope=None if job.idempotency is None else job.idempotency.scope,
        history=f"{now_time:.6f} {placed.state} 0 - submitted\n",
    )
    add(connection, row, (stored.body, stored.headers, job.caller, job.reservation))
    return row


_INSERT: Final = f"INSERT INTO job VALUES (NULL{', ?' * (len(JobRow.__struct_fields__) - 1)})"  # noqa: S608 - own names


def add(connection: Connection, row: JobRow, payload: tuple[bytes, ...]) -> None:
    connection.execute(_INSERT, tuple(getattr(row, name) for name in JobRow.__struct_fields__[1:]))
    row.seq = connection.last_insert_rowid()
    connection.execute(
        "INSERT INTO payload (seq, body, headers, caller, reservation) VALUES (?, ?, ?, ?, ?)",
        (row.seq, *payload),
    )
    queue_turns.shift(connection, row.tenant, (row.line, queue_turns.Delta()), queue_turns.turn_of(row))
    bear(connection, row.tenant, 1, row.body_bytes)
    count(connection, "", row.state)


def promote(connection: Connection, now_time: float) -> int:
    """Jobs whose time to be tried again has come are ready."""
    rows = job_rows(connection, "SELECT * FROM job WHERE not_before_time <= ? LIMIT ?", (now_time, _PROMOTED))
    for row in rows:
        move(connection, row, "queued", now_time, "its time has come", not_before_time=None)
    return len(rows)


def claim(connection: Connection, lane: str, owner: str, now_time: float, *, is_alone: bool) -> Run | None:
    """The job whose turn it is, leased to the owner."""
    promote(connection, now_time)
    lines = [
        line
        for (line,) in connection.execute(
            "SELECT line FROM job WHERE owner = ? AND lease_until_time IS NOT NULL", (owner,)
        )
    ]
    if is_alone and lines:
        return None
    if any(line.startswith(SUSPECT) for line in lines):
        return None
    line = SUSPECT + lane if is_alone else lane
    for _ in range(_SKIPPED):
        row = queue_turns.pick(connection, line, now_time)
        if row is None:
            return None
        if row.expires_time <= now_time:
            expire(connection, row, now_time)
        elif row.parent and _is_stopped(connection, row.parent):
            end(connection, row, End("cancelled", "its parent was"), now_time)
        else:
            return _run(connection, row, owner, now_time)
    return None


def _is_stopped(connection: Connection, parent_id: str) -> bool:
    return connection.execute("SELECT state FROM parent WHERE id = ?", (parent_id,)).get in _STOPPED


def _run(connection: Connection, row: JobRow, owner: str, now_time: float) -> Run:
    queue_turns.served(connection, row)
    move(
        connection,
        row,
        "running",
        now_time,
        "claimed",
        fence=row.fence + 1,
        runs=row.runs + 1,
        owner=owner,
        lease_until_time=now_time + LEASE_S,
        started_time=now_time,
        charged=row.estimate,
    )
    queue_turns.charge(connection, row, row.estimate)
    payload = connection.execute(
        "SELECT body, headers, caller, reservation, carried FROM payload WHERE seq = ?", (row.seq,)
    ).get
    return Run(row, *payload)


def renew(connection: Connection, leases: Sequence[Lease], now_time: float) -> dict[str, State]:
    """Those that still stand, by their job's state."""
    found: dict[str, State] = {}
    for lease in leases:
        row = find(connection, lease.job_id)
        if row is not None and is_held(row, lease):
            connection.execute(
                "UPDATE job SET lease_until_time = ? WHERE seq = ?", (now_time + LEASE_S, row.seq)
            )
            found[row.id] = row.state
    return found


def finish(
    connection: Connection, lease: Lease, outcome: Outcome, answer: Answer | None, now_time: float
) -> tuple[JobRow, bool]:
    """The job as it ended, and whether it did so now."""
    row = find(connection, lease.job_id)
    if row is not None and row.state in FINAL and (row.fence, row.owner) == (lease.fence, lease.owner):
        return row, False
    if row is None or not is_held(row, lease):
        raise LeaseLostError(lease.job_id)
    keep_answer(connection, row, answer)
    how = End(
        outcome.state,
        "finished",
        outcome.error,
        outcome.ledger_row,
        lease.owner,
        0 if answer is None else answer.status,
        0 if answer is None else answer.size,
        outcome.units,
        outcome.cost_nanousd,
        outcome.usage,
    )
    end(connection, row, how, now_time)
    return row, True


def keep_answer(connection: Connection, row: JobRow, answer: Answer | None) -> None:
    if answer is not None:
        connection.execute(
            "INSERT INTO result VALUES (?, ?, ?, ?)", (row.seq, answer.headers, answer.body, answer.file)
        )


def fail(
    connection: Connection, lease: Lease, failure: Failure, answer: Answer | None, now_time: float
) -> tuple[JobRow, bool]:
    """The job as it stands then, and whether the answer was kept: it was the last attempt."""
    row = held(connection, lease)
    attempts = row.attempts + int(failure.is_counted)
    connection.execute(
        "UPDATE job SET attempts = ?, error = ? WHERE seq = ?", (attempts, failure.error, row.seq)
    )
    row.attempts, row.error = attempts, failure.error
    if failure.carried is not None:
        connection.execute("UPDATE payload SET carried = ? WHERE seq = ?", (failure.carried, row.seq))
    is_last = attempts >= row.max_attempts
    not_before_time = now_time + max(0.0, failure.retry_in_s)
    if row.state != "cancelling" and not is_last and not_before_time < row.expires_time:
        queue_turns.charge(connection, row, row.charged if failure.units is None else failure.units)
        requeue(connection, row, now_time, "failed", not_before_time=not_before_time)
        return row, False
    state: State = "dead" if is_last else "expired"
    if row.state == "cancelling":
        state = "cancelled"
    keep_answer(connection, row, answer)
    how = End(
        state,
        "failed",
        failure.error,
        failure.ledger_row,
        lease.owner,
        0 if answer is None else answer.status,
        0 if answer is None else answer.size,
        failure.units,
        failure.cost_nanousd,
    )
    end(connection, row, how, now_time)
    return row, True


def release(connection: Connection, leases: Sequence[Lease], retry_in_s: float, now_time: float) -> list[str]:
    """The ids of those that went back."""
    found = []
    not_before_time = now_time + retry_in_s if retry_in_s > 0 else None
    for lease in leases:
        row = find(connection, lease.job_id)
        if row is not None and is_held(row, lease):
            requeue(connection, row, now_time, "released", not_before_time=not_before_time)
            found.append(row.id)
    return found


def owner_died(connection: Connection, owner: str, now_time: float) -> int:
    """How many leases it had."""
    rows = job_rows(
        connection, "SELECT * FROM job WHERE owner = ? AND lease_until_time IS NOT NULL", (owner,)
    )
    for row in rows:
        lose_owner(connection, row, now_time, "its owner died")
    connection.execute(
        "UPDATE settled SET due_time = ?, owner = '' WHERE owner = ? AND due_time IS NOT NULL",
        (now_time, owner),
    )
    connection.execute(
        "UPDATE outbox SET next_time = ?, owner = '' WHERE owner = ? AND next_time IS NOT NULL",
        (now_time, owner),
    )
    connection.execute(
        "UPDATE parent SET lease_until_time = ? WHERE owner = ? AND state IN ('validating', 'finalizing')",
        (now_time, owner),
    )
    return len(rows)


def cancel(connection: Connection, tenant: str, job_id: str, now_time: float) -> JobRow | None:
    row = find(connection, job_id, tenant)
    if row is None:
        return None
    if row.is_waiting:
        end(connection, row, End("cancelled", "cancelled"), now_time)
    elif row.state == "running":
        move(connection, row, "cancelling", now_time, "cancelled")
    return row


def append_events(connection: Connection, lease: Lease, first: int, events: Sequence[bytes]) -> None:
    row = held(connection, lease)
    if first != row.events:
        raise OutOfOrderError(row.events)
    connection.executemany(
        "INSERT INTO event VALUES (?, ?, ?, ?)",
        [(row.seq, first + at, row.fence, data) for at, data in enumerate(events)],
    )
    connection.execute("UPDATE job SET events = events + ? WHERE seq = ?", (len(events), row.seq))


def replay(
    connection: Connection, job_id: str, again_id: str, content: tuple[bytes, ...], now_time: float
) -> JobRow | None:
    """A dead job's request as a new one; `content`: body, headers and caller, stored for the new job's id."""
    row = find(connection, job_id)
    if row is None or row.state != "dead" or row.is_purged:
        return None
    if row.replayed_as:
        return find(connection, row.replayed_as)
    again = JobRow(*(getattr(row, name) for name in JobRow.__struct_fields__))
    again.id, again.replay_of = again_id, row.id
    again.state, again.line, again.parent, again.position = "queued", row.lane, "", 0
    again.attempts = again.runs = again.deaths = again.fence = again.status = again.result_bytes = 0
    again.submitted_time = again.queued_time = now_time
    again.expires_time = again.due_time = now_time + (row.expires_time - row.submitted_time)
    again.started_time = again.finished_time = again.cost_nanousd = again.scope = None
    again.error, again.owner, again.usage, again.events = "", "", b"", 0
    again.history = f"{now_time:.6f} queued 0 - replayed\n"
    add(connection, again, (*content, b""))
    connection.execute("UPDATE job SET replayed_as = ? WHERE seq = ?", (again.id, row.seq))
    return again


def replay_id(job_id: str) -> str:
    """With the prefix of the job's own id."""
    return new_id(job_id.rpartition("_")[0] or "job")
