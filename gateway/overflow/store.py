"""The contract of a store of jobs. SQLite and Redis keep it; one conformance suite asks both.

Invariants every store holds, whoever dies when:

- What a method has returned from is on disk (for Redis: see `gateway.stores.queue_redis`); an operation is done whole
  or not at all. A method that raises StoreAwayError may or may not have been carried out: submitting again with the same
  ids, or ending with the same lease, is safe.
- Every change of a job is a compare-and-set on (id, state, fence), and of the owner. Whoever loses changes nothing and is told
  (LeaseLostError). Two runs of a job never have the same fence.
- A job reaches one final state and stays in it. In the same transaction: its result, its Settled row, its parent's counts,
  and the outbox row of whoever it or its parent tells.
- Somebody else's id is an unknown id.

Time is the store's own. Ids are made by the caller (`job.new_id`), so that a repetition is recognised.
"""

from collections.abc import Sequence
from typing import Protocol

from gateway.overflow.job import (
    Claimed,
    Event,
    Failure,
    Job,
    JobFilter,
    JobPage,
    Lease,
    NewJob,
    NewParent,
    OutboxRow,
    Outcome,
    Parent,
    ParentLease,
    ParentState,
    QueueStats,
    Result,
    Settled,
    Standing,
    State,
    Submitted,
    Swept,
    TenantLimits,
)
from gateway.stores.limit_store import StoreAwayError

__all__ = [
    "IdempotencyConflictError",
    "LeaseLostError",
    "OutOfOrderError",
    "QueueFullError",
    "QueueStore",
    "QueueStoreError",
    "ResultTooLargeError",
    "StoreAwayError",
]

# Results: compressed up to INLINE_BYTES they are in the database; above that in `queue.result_folder`, where there is one;
# without one, uncompressed up to LARGEST_BYTES they are accepted.
INLINE_BYTES = 4 * 1024 * 1024
LARGEST_BYTES = 16 * 1024 * 1024
FORGET_S = 30 * 86_400.0  # what is kept of a job after its result is gone


class QueueStoreError(Exception):
    """The store understood and refuses. Nothing was changed."""


class LeaseLostError(QueueStoreError):
    """Somebody else has the job, or it has ended: stop working on it at once."""


class IdempotencyConflictError(QueueStoreError):
    """The idempotency key was used with other content: 422."""


class QueueFullError(QueueStoreError):
    """The tenant has as much waiting as it may: 429. `depth` jobs of `depth_bytes` wait already."""

    def __init__(self, depth: int, depth_bytes: int) -> None:
        super().__init__(f"{depth} jobs of {depth_bytes} bytes are waiting")
        self.depth, self.depth_bytes = depth, depth_bytes


class ResultTooLargeError(QueueStoreError):
    """The result cannot be kept: finish as `failed`, without it."""


class OutOfOrderError(QueueStoreError):
    """Events or children do not follow what is there; `expected` is the index or position that would."""

    def __init__(self, expected: int) -> None:
        super().__init__(f"{expected} is next")
        self.expected = expected


class QueueStore(Protocol):
    """One per process; every method may be called at any time, beside the others. All raise StoreAwayError when the store
    cannot be used now (disk full, locked, Redis away)."""

    # -- handing in

    async def submit(self, job: NewJob, limits: TenantLimits) -> Submitted:
        """(none) -> queued. Committed when it returns: only then may a 202 be sent.

        The same idempotency scope and fingerprint give the job made before, as does the same job id of the same tenant
        again; another fingerprint is an IdempotencyConflictError. QueueFullError beyond the tenant's caps. An idempotency scope is
        remembered until its job is purged."""
        ...

    async def submit_all(
        self, parent: NewParent, jobs: Sequence[NewJob], limits: TenantLimits
    ) -> tuple[Parent, bool]:
        """A parent with all of its children, queued at once in one transaction (at most 1,000); positions as in `jobs`.

        The parent is `in_progress`. The second value is False where its idempotency key had made it before. Errors as `submit`."""
        ...

    async def open_parent(self, parent: NewParent, owner: str) -> tuple[Parent, ParentLease | None]:
        """A parent that is `validating`, leased to `owner` for LEASE_S; no lease where its idempotency key had made it before."""
        ...

    async def append_children(
        self, lease: ParentLease, first: int, jobs: Sequence[NewJob], limits: TenantLimits
    ) -> Parent:
        """Stages jobs at positions `first`, `first` + 1, ... of a `validating` parent, one transaction (at most 1,000 jobs).

        OutOfOrderError unless `first` is the parent's `total`: who takes over after a crash goes on from there.
        QueueFullError beyond the caps, with none of them appended. Renews the lease. LeaseLostError also when the parent
        is no longer `validating` (cancelled, expired)."""
        ...

    async def release_parent(self, lease: ParentLease, most: int = 500) -> int:
        """Staged children become queued, up to `most` of them; how many are left. Call until 0: then the parent is
        `in_progress` (without children, `finalizing` or final). Renews the lease."""
        ...

    async def fail_parent(self, lease: ParentLease, details: bytes) -> Parent:
        """validating -> failed; staged children become `cancelled` by and by. `details` replaces the door's record."""
        ...

    # -- running

    async def claim(self, lane: str, owner: str, *, is_alone: bool = False) -> Claimed | None:
        """queued -> running, of the lane's tenants the one with the least weighted service so far; None: nothing is ready,
        or `owner` runs a suspect, which must be alone. The lease ends after LEASE_S.

        `is_alone` True asks for a suspect only (`LaneStats.solitary`), and gets one only if `owner` has no other lease;
        without it suspects are passed by. A job that has expired, or whose parent was cancelled, is ended instead of
        handed out. A tenant with more than half of the lane's running jobs is passed over while others wait; of 20
        claims at least one is a batch job where there is one."""
        ...

    async def renew(self, leases: Sequence[Lease]) -> dict[str, State]:
        """Each lease is good for LEASE_S from now. By job id `running`, or `cancelling`: abort and finish as cancelled. A job
        that is missing in the answer was lost: abort at once, do not finish."""
        ...

    async def finish(self, lease: Lease, outcome: Outcome) -> Job:
        """running | cancelling -> `outcome.state`, with everything it entails, in one transaction.

        A finish that is repeated with the same lease returns the job as it stands. LeaseLostError: nothing was written, the run
        was waste. ResultTooLargeError: still leased."""
        ...

    async def fail(self, lease: Lease, failure: Failure) -> Job:
        """running -> queued, not before `retry_in_s` have passed; or -> dead when it was the last attempt; or -> expired
        when it could not be tried again in time; cancelling -> cancelled. LeaseLostError as above."""
        ...

    async def release(self, leases: Sequence[Lease], retry_in_s: float = 0.0) -> list[str]:
        """running -> queued, as if it had not been claimed but for the fence (drain, no capacity after all); cancelling ->
        cancelled. The ids of those whose lease was still good; the others are passed over."""
        ...

    async def owner_died(self, owner: str) -> int:
        """Its process is known to be gone: its leases are given up now, not when they lapse. How many there were.

        A job that lost DEATHS_SUSPECT owners so waits for a run alone, one that lost DEATHS_DEAD is dead. Outbox rows and
        parents it had leased are free at once."""
        ...

    # -- its caller's side

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        """staged | queued -> cancelled (free of charge); running -> cancelling; a final job is returned as it is. None: unknown."""
        ...

    async def get(self, tenant: str, job_id: str) -> Job | None:
        """None: unknown, or forgotten. "" as `tenant`: the operator asks, of any tenant (also below, where a tenant is given)."""
        ...

    async def result(self, tenant: str, job_id: str) -> Result | None:
        """Of a final job, the same bytes at every call. None: there is none, or it was purged (`Job.is_purged`)."""
        ...

    async def purge(self, tenant: str, job_id: str) -> Job | None:
        """A final job's request, result and events are really deleted now, not only when their time is over. The job as it
        stands, one that has not ended as it was; None: unknown."""
        ...

    async def list_jobs(self, where: JobFilter, cursor: str | None = None, limit: int = 20) -> JobPage:
        """Newest first; children of one parent by position. A cursor that is not ours starts at the beginning."""
        ...

    async def standing(self, tenant: str, job_id: str) -> Standing | None:
        """Its place in the queue now. None: unknown."""
        ...

    # -- parents

    async def get_parent(self, tenant: str, parent_id: str) -> Parent | None: ...

    async def list_parents(
        self, tenant: str, door: str, after: str = "", limit: int = 20
    ) -> tuple[list[Parent], bool]:
        """Newest first, those after the one with the id `after`; whether there are more."""
        ...

    async def cancel_parent(self, tenant: str, parent_id: str) -> Parent | None:
        """-> cancelling, and final (or `finalizing`) once all children are. No child is claimed any more, running ones are
        cancelled; children that have ended stay as they are. A final or finalizing one is returned as it is."""
        ...

    async def claim_parent(self, owner: str, door: str) -> tuple[Parent, ParentLease] | None:
        """One that has work for its door and no live lease: `validating` (its owner died: append from `total` on, then release), or
        `finalizing`. None: there is none."""
        ...

    async def renew_parent(self, lease: ParentLease) -> None:
        """Good for LEASE_S from now, or LeaseLostError."""
        ...

    async def finish_parent(self, lease: ParentLease, state: ParentState, details: bytes) -> Parent:
        """finalizing -> completed | failed | cancelled | expired, with its outbox row. Repeated with the same lease it
        returns the parent as it stands."""
        ...

    # -- streams

    async def append_events(self, lease: Lease, first: int, events: Sequence[bytes]) -> None:
        """Journals events at indexes `first`, `first` + 1, ...; OutOfOrderError unless `first` is the next one, LeaseLostError
        unless the lease is good. A new run goes on where the one before broke off: the runner says what that means."""
        ...

    async def events_after(self, tenant: str, job_id: str, index: int, limit: int = 200) -> list[Event]:
        """Events with a higher index, in order; -1 for all. Until the job is purged."""
        ...

    # -- the operator's side

    async def replay(self, tenant: str, job_id: str) -> Job | None:
        """A dead job's request as a new job (a job has one final state), outside its parent, without idempotency key and
        reservation. Repeated: the job it made then. None: unknown, or not dead, or purged."""
        ...

    async def stats(self) -> QueueStats: ...

    async def sweep(self, most: int = 200) -> Swept:
        """Ends what nobody ends otherwise, at most so many at a time: leases that lapsed are requeued (as `owner_died`), what
        is past its expiry is expired (running ones, too: their owner learns when it renews), children of cancelled
        parents are cancelled, results past `keep_s` are really deleted, what was purged FORGET_S ago is forgotten.
        Every process calls it every few seconds; it costs next to nothing when there is nothing."""
        ...

    # -- what a job's end owes to others

    async def take_settled(self, owner: str, most: int = 200) -> list[Settled]:
        """Rows that wait for the ledger, leased to `owner` for LEASE_S, the oldest first. Entering a ledger row twice is
        harmless (its request id is the ledger's primary key)."""
        ...

    async def ack_settled(self, rows: Sequence[Settled]) -> list[str]:
        """They are in the ledger. The job ids of those this owner still had: whose reservations it gives back now, and nobody
        else ever does. (Should it die right then, they lapse by themselves.)"""
        ...

    async def take_outbox(self, owner: str, most: int = 20) -> list[OutboxRow]:
        """News whose time has come, leased to `owner` for 2 x LEASE_S, the oldest first."""
        ...

    async def outbox_delivered(self, row: OutboxRow) -> None: ...

    async def outbox_failed(
        self, row: OutboxRow, retry_in_s: float | None, error: str, *, is_counted: bool = True
    ) -> None:
        """To be tried again after so long, or never again (None). `is_counted` False: it was not tried, its receiver has
        no place for it. Of no effect once another has the row's lease."""
        ...

    async def list_outbox(self, subject: str = "", most: int = 100) -> list[OutboxRow]:
        """Of this job or parent, or all; delivered ones too, newest first. Kept for FORGET_S."""
        ...

    async def outbox_replay(self, row_id: str) -> bool:
        """Due again, under the same id, whether it was delivered or dead. False: unknown."""
        ...

    async def close(self) -> None:
        """Once nothing is under way."""
        ...
