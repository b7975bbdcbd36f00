"""The words of the queue: a job, its states and classes, what is handed in, claimed, finished, and read again.

Plain records that every store takes and gives. Owns ids and which states are final. Refuses to know how anything is
stored, run or shown. Times ending in `_time` are the store's wall clock in seconds, `_s` are durations. `bytes` fields
that are said to be opaque are carried, never read.
"""

import secrets
from typing import Final, Literal

import msgspec

State = Literal[
    "staged",  # a child of a parent that is still being taken in; nobody may claim it
    "queued",  # waits for its turn, or for `not_before_time`
    "running",  # claimed: somebody has a lease on it
    "cancelling",  # cancelled while it ran: its owner learns so when it renews
    "succeeded",  # ended with an answer
    "failed",  # ended through the request's own fault: another try would end the same
    "dead",  # ended through ours: engines, crashes; an operator may replay it
    "cancelled",  # ended by its caller
    "expired",  # ended because nobody could run it in time
]
FINAL: Final = frozenset({"succeeded", "failed", "dead", "cancelled", "expired"})
LEASED: Final = frozenset({"running", "cancelling"})  # somebody has it
FinalState = Literal["succeeded", "failed", "dead", "cancelled", "expired"]
ALL_STATES: Final[tuple[State, ...]] = (
    "staged",
    "queued",
    "running",
    "cancelling",
    "succeeded",
    "failed",
    "dead",
    "cancelled",
    "expired",
)

# `flex` goes before `batch` within a tenant; a batch job that has waited AGEING_S counts as flex.
JobClass = Literal["flex", "batch"]
AGEING_S: Final = 900.0

# The door a job came through. `job`: `/v1/jobs` and whatever spilled into the queue.
Door = Literal["job", "held", "batch", "response", "workers_ai"]

# `validating`: children are appended and staged. `in_progress`: released. `finalizing`: all children are final, its
# door has work left. The other four are final.
ParentState = Literal[
    "validating", "in_progress", "cancelling", "finalizing", "completed", "failed", "cancelled", "expired"
]
PARENT_FINAL: Final = frozenset({"completed", "failed", "cancelled", "expired"})

LEASE_S: Final = 30.0
RENEW_S: Final = 10.0
# A process that died owning a job so often: the next run is alone in its process; so often again, the job is dead.
DEATHS_SUSPECT: Final = 2
DEATHS_DEAD: Final = 3


def new_id(prefix: str) -> str:
    """`job_...`, `batch_...`, `resp_...`: 128 bits that nobody guesses."""
    return f"{prefix}_{secrets.token_hex(16)}"


class TenantLimits(msgspec.Struct, frozen=True):
    """What a tenant may have waiting (0: no cap), and its share of the service beside others. From the configuration,
    as it stands when something is handed in; the store keeps the latest weight."""

    queued_jobs: int = 0
    queued_bytes: int = 0
    weight: float = 1.0


class IdempotencyKey(msgspec.Struct, frozen=True):
    """`scope`: hash of tenant, path and key. `fingerprint`: hash of what is asked for."""

    scope: bytes
    fingerprint: bytes


class NewJob(msgspec.Struct, frozen=True, kw_only=True):
    """A job to be handed in. `lane` is what it competes for: jobs of one lane are claimed together, by whoever has room
    for that lane (usually the public model's name)."""

    id: str
    tenant: str  # everything is looked up by (tenant, id)
    key_id: str
    lane: str
    model: str  # public name
    path: str  # of the dialect: `/v1/chat/completions`
    body: bytes
    headers: bytes = b""  # opaque: what the runner needs of the client's
    caller: bytes = b""  # opaque: as whom it runs
    door: Door = "job"
    job_class: JobClass = "flex"
    is_stream: bool = False  # its events are journaled
    estimate: int = 1  # of its cost in the lane's units (tokens); charged at claim, corrected when it ends
    max_attempts: int = 5
    expires_in_s: float = 86_400.0  # from now on
    keep_s: float = 86_400.0  # its result, from when it ends
    reference: str = ""  # the client's own: `external_reference`, `custom_id`
    webhook: str = (
        ""  # who is told when it ends: receivers, blanks between, an outbox row for each; "": nobody
    )
    reservation: bytes = (
        b""  # opaque: what was taken of limits and budgets, given back through its Settled row
    )
    details: bytes = b""  # opaque: what its door wants to remember
    idempotency: IdempotencyKey | None = None


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job as it stands; without its body and its result."""

    id: str
    tenant: str
    key_id: str
    lane: str
    model: str
    path: str
    door: Door
    job_class: JobClass
    is_stream: bool
    state: State
    fence: int  # rises with every claim; never used twice for one job
    attempts: int  # failed ones that count
    max_attempts: int
    runs: int  # claims so far: `X-Request-Id: <job>.<runs>`
    deaths: int  # of processes that owned it
    submitted_time: float
    expires_time: float
    keep_s: float
    body_bytes: int
    estimate: int
    started_time: float | None = None  # of the latest run
    finished_time: float | None = None
    not_before_time: float | None = None  # while it waits to be tried again
    owner: str = ""  # while it runs
    lease_until_time: float | None = None
    parent: str = ""
    position: int = 0  # among its parent's children, from 0
    reference: str = ""
    webhook: str = ""
    status: int = 0  # HTTP status of its result
    result_bytes: int = 0
    error: str = ""  # why it failed, is dead, or is tried again; one line for its caller
    cost_nanousd: int | None = None
    usage: bytes = b""  # opaque: JSON as its dialect reports it, for webhooks
    details: bytes = b""
    replay_of: str = ""  # the dead job this is a new try of
    replayed_as: str = ""
    is_purged: bool = False  # its result is gone (410); the rest is kept for 30 days more
    history: str = ""  # a line per transition: time state fence owner reason

    @property
    def is_final(self) -> bool:
        return self.state in FINAL


class Lease(msgspec.Struct, frozen=True):
    """The right to end a job's run. Only the newest lease of a job is worth anything."""

    job_id: str
    fence: int
    owner: str


class Claimed(msgspec.Struct, frozen=True, kw_only=True):
    """A job to be run. `carried` is what earlier runs left (`Failure.carried`). `is_solitary`: it may be what killed its
    process before, so nothing else may run in this one."""

    job: Job
    lease: Lease
    body: bytes
    headers: bytes
    caller: bytes
    reservation: bytes
    carried: bytes
    is_solitary: bool


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """An answer as the client gets it."""

    status: int
    headers: bytes  # opaque: a JSON list of pairs, as `gateway.recording` writes them
    body: bytes


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a job, as its runner wants it. `ledger_row`: the encoded row of all its runs, under the job's one
    request id; empty: there is nothing to bill. `units`: what it really cost, as `NewJob.estimate`."""

    state: Literal["succeeded", "failed", "cancelled"]
    result: Result | None = None
    error: str = ""
    units: int | None = None  # None: as estimated
    cost_nanousd: int | None = None
    usage: bytes = b""
    ledger_row: bytes = b""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A run that failed. `is_counted` False: a lack of capacity, no attempt of the job's. When it was the last attempt the
    job is dead, with `result` and `ledger_row` as its end."""

    error: str
    retry_in_s: float
    is_counted: bool = True
    carried: bytes | None = None  # opaque: for the next run; None: as before
    units: int | None = 0
    result: Result | None = None
    cost_nanousd: int | None = None
    ledger_row: bytes = b""


class Submitted(msgspec.Struct, frozen=True):
    """`is_new` False: the idempotency key was used before with the same content, and this is the job it made."""

    job: Job
    is_new: bool


class NewParent(msgspec.Struct, frozen=True, kw_only=True):
    """Several jobs under one name. With `is_finalized` its door ends it (`finish_parent`) once all children have; without,
    the store does so in the transaction that ends the last one."""

    id: str
    tenant: str
    key_id: str
    door: Door
    is_finalized: bool
    expires_in_s: float = 86_400.0  # of the parent; each child has its own as well
    keep_s: float = 86_400.0
    webhook: str = ""
    announces: str = ""  # of `webhook`, who hears of its being handed in, too: rows of the state `queued`
    details: bytes = b""  # opaque: the door's own record of it
    idempotency: IdempotencyKey | None = None


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """A parent as it stands. `counts` has its children by state, without the states that have none."""

    id: str
    tenant: str
    key_id: str
    door: Door
    state: ParentState
    is_finalized: bool
    total: int  # children appended so far
    counts: dict[str, int]
    fence: int
    created_time: float
    expires_time: float
    keep_s: float
    released_time: float | None = None
    settled_time: float | None = None  # when the last child ended
    cancelled_time: float | None = None  # when cancelling began
    finished_time: float | None = None
    webhook: str = ""
    details: bytes = b""
    owner: str = ""
    lease_until_time: float | None = None

    @property
    def is_final(self) -> bool:
        return self.state in PARENT_FINAL


class ParentLease(msgspec.Struct, frozen=True):
    """The right to work on a parent: to append, release, finalize."""

    parent_id: str
    fence: int
    owner: str


class Event(msgspec.Struct, frozen=True, array_like=True):
    """One piece of a journaled stream. `index` counts from 0 over all runs; `fence` says which run wrote it."""

    index: int
    fence: int
    data: bytes


class OutboxRow(msgspec.Struct, frozen=True, kw_only=True):
    """News that one receiver is to hear: one row for each name in the subject's `webhook`. Written in the transaction that
    made `state` true. `id` is the row's own, and the same at every delivery; `fence` is the lease's."""

    id: str  # `msg_...`
    subject: str  # the job or parent
    tenant: str
    door: Door
    is_parent: bool
    state: str
    webhook: str  # the one receiver's name
    created_time: float
    attempts: int = 0  # deliveries that failed
    fence: int = 0
    next_time: float | None = None  # None: delivered or dead
    delivered_time: float | None = None
    error: str = ""


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """What a job's end owes to the ledger and to limits. `ledger_row` empty: nothing to bill. At most one per job."""

    job_id: str
    state: State
    ledger_row: bytes
    reservation: bytes
    fence: int  # of the lease this was taken with


class LaneStats(msgspec.Struct, frozen=True, kw_only=True):
    """A lane as it stands. `delayed` are among `queued`; `solitary` are suspects that wait for a process of their own, and
    among `queued` too."""

    queued: int = 0
    delayed: int = 0
    solitary: int = 0
    queued_flex: int = 0
    queued_batch: int = 0
    running: int = 0
    tenants: int = 0  # that have something ready
    oldest_queued_time: float | None = None
    finished_per_s: float = 0.0  # lately


class QueueStats(msgspec.Struct, frozen=True, kw_only=True):
    """`states` counts jobs that were not forgotten yet, without the states that have none."""

    lanes: dict[str, LaneStats]
    states: dict[str, int]
    outbox_due: int
    outbox_waiting: int
    outbox_dead: int
    unsettled: int  # Settled rows that wait for the ledger
    now_time: float


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job is in the queue. `ahead` are the jobs that fair turns would claim before it; 0 when it is not queued.
    An estimate of its wait is `ahead / finished_per_s`."""

    state: State
    ahead: int
    lane: LaneStats


class JobFilter(msgspec.Struct, frozen=True):
    """Which jobs to list; an empty field: any."""

    tenant: str = ""
    parent: str = ""
    lane: str = ""
    doors: tuple[Door, ...] = ()
    states: tuple[State, ...] = ()


class JobPage(msgspec.Struct, frozen=True):
    """`cursor` continues after the last job; None: there are no more."""

    jobs: list[Job]
    cursor: str | None


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """What one sweep did. `is_all` False: there is more to do, sweep again."""

    requeued: int = 0  # leases that had lapsed
    dead: int = 0
    expired: int = 0
    cancelled: int = 0
    purged: int = 0
    forgotten: int = 0
    is_all: bool = True
