"""The tables of queue.db and the rows in them.

Knows columns, not transitions (`gateway.stores.queue_moves`). Invariants: a job's wide row never holds its body or result,
which have tables of their own; what is claimed by is found through partial indexes that hold only what can be claimed.
Deleted content is overwritten (`secure_delete`).
"""

from typing import Any, Final

import msgspec

from gateway.overflow.job import ALL_STATES, Job, JobClass, Parent, State
from gateway.stores.sqlite import Connection

CLASSES: Final[tuple[JobClass, ...]] = ("flex", "batch")
# A job that may have killed its process waits in a line of its own: this, and its lane.
SUSPECT: Final = "\x01"

# `line`: its lane, or SUSPECT and its lane. `charged`: what its tenant paid for the run under way. `due_time`: when the sweep
# looks at it next, to expire, purge or forget it. `owner` stays after the end where its own finish was the end.
_JOB: Final = """
CREATE TABLE job (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    key_id TEXT NOT NULL,
    lane TEXT NOT NULL,
    line TEXT NOT NULL,
    model TEXT NOT NULL,
    path TEXT NOT NULL,
    door TEXT NOT NULL,
    class INTEGER NOT NULL,
    is_stream INTEGER NOT NULL,
    state TEXT NOT NULL,
    fence INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL,
    runs INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    submitted_time REAL NOT NULL,
    queued_time REAL NOT NULL,
    expires_time REAL NOT NULL,
    due_time REAL NOT NULL,
    keep_s REAL NOT NULL,
    body_bytes INTEGER NOT NULL,
    estimate INTEGER NOT NULL,
    charged INTEGER NOT NULL DEFAULT 0,
    started_time REAL,
    finished_time REAL,
    not_before_time REAL,
    owner TEXT NOT NULL DEFAULT '',
    lease_until_time REAL,
    parent TEXT NOT NULL DEFAULT '',
    position INTEGER NOT NULL DEFAULT 0,
    reference TEXT NOT NULL,
    webhook TEXT NOT NULL,
    status INTEGER NOT NULL DEFAULT 0,
    result_bytes INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '',
    cost_nanousd INTEGER,
    usage BLOB NOT NULL DEFAULT x'',
    details BLOB NOT NULL,
    replay_of TEXT NOT NULL DEFAULT '',
    replayed_as TEXT NOT NULL DEFAULT '',
    is_purged INTEGER NOT NULL DEFAULT 0,
    events INTEGER NOT NULL DEFAULT 0,
    scope BLOB,
    history TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX job_ready ON job (line, tenant, class, seq) WHERE state = 'queued' AND not_before_time IS NULL;
CREATE INDEX job_delayed ON job (not_before_time) WHERE not_before_time IS NOT NULL;
CREATE INDEX job_leased ON job (lease_until_time) WHERE lease_until_time IS NOT NULL;
CREATE INDEX job_owned ON job (owner) WHERE lease_until_time IS NOT NULL;
CREATE INDEX job_due ON job (due_time);
CREATE INDEX job_by_tenant ON job (tenant, seq);
CREATE UNIQUE INDEX job_by_parent ON job (parent, position) WHERE parent != '';
CREATE INDEX job_unstarted ON job (parent, state, position) WHERE parent != '' AND state IN ('staged', 'queued');
CREATE TABLE payload (
    seq INTEGER PRIMARY KEY REFERENCES job (seq) ON DELETE CASCADE,
    body BLOB NOT NULL,
    headers BLOB NOT NULL,
    caller BLOB NOT NULL,
    reservation BLOB NOT NULL,
    carried BLOB NOT NULL DEFAULT x''
) STRICT;
CREATE TABLE result (
    seq INTEGER PRIMARY KEY REFERENCES job (seq) ON DELETE CASCADE,
    headers BLOB NOT NULL,
    body BLOB NOT NULL,
    file TEXT NOT NULL
) STRICT;
CREATE TABLE event (
    seq INTEGER NOT NULL REFERENCES job (seq) ON DELETE CASCADE,
    number INTEGER NOT NULL,
    fence INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (seq, number)
) STRICT, WITHOUT ROWID;
"""

# `share`: what a tenant has of a line. `vt`: service so far, divided by its weight. `line.floor`: the least service of those
# that waited at the latest claim, where a tenant that returns begins. `line.since_batch`: claims since one was a batch job.
_TURNS: Final = """
CREATE TABLE share (
    line TEXT NOT NULL,
    tenant TEXT NOT NULL,
    vt REAL NOT NULL,
    weight REAL NOT NULL DEFAULT 1.0,
    flex INTEGER NOT NULL DEFAULT 0,
    batch INTEGER NOT NULL DEFAULT 0,
    running INTEGER NOT NULL DEFAULT 0,
    delayed INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (line, tenant)
) STRICT, WITHOUT ROWID;
CREATE INDEX share_ready ON share (line, vt) WHERE flex + batch > 0;
CREATE INDEX share_batch ON share (line, vt) WHERE batch > 0;
CREATE TABLE line (
    line TEXT PRIMARY KEY NOT NULL,
    floor REAL NOT NULL DEFAULT 0.0,
    since_batch INTEGER NOT NULL DEFAULT 0,
    running INTEGER NOT NULL DEFAULT 0,
    rate REAL NOT NULL DEFAULT 0.0,
    rate_time REAL NOT NULL DEFAULT 0.0
) STRICT, WITHOUT ROWID;
CREATE TABLE load (
    tenant TEXT PRIMARY KEY NOT NULL, jobs INTEGER NOT NULL, bytes INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE tally (state TEXT PRIMARY KEY NOT NULL, jobs INTEGER NOT NULL DEFAULT 0) STRICT, WITHOUT ROWID;
"""

_PARENTS: Final = f"""
CREATE TABLE parent (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    key_id TEXT NOT NULL,
    door TEXT NOT NULL,
    state TEXT NOT NULL,
    is_finalized INTEGER NOT NULL,
    fence INTEGER NOT NULL DEFAULT 0,
    owner TEXT NOT NULL DEFAULT '',
    lease_until_time REAL,
    created_time REAL NOT NULL,
    expires_time REAL NOT NULL,
    due_time REAL,
    keep_s REAL NOT NULL,
    released_time REAL,
    settled_time REAL,
    cancelled_time REAL,
    finished_time REAL,
    is_stopping INTEGER NOT NULL DEFAULT 0,
    webhook TEXT NOT NULL,
    details BLOB NOT NULL,
    scope BLOB,
    total INTEGER NOT NULL DEFAULT 0,
    {", ".join(f"{state} INTEGER NOT NULL DEFAULT 0" for state in ALL_STATES)}
) STRICT;
CREATE INDEX parent_by_tenant ON parent (tenant, door, seq);
CREATE INDEX parent_at_work ON parent (door, seq) WHERE state IN ('validating', 'finalizing');
CREATE INDEX parent_stopping ON parent (seq) WHERE is_stopping = 1;
CREATE INDEX parent_due ON parent (due_time) WHERE due_time IS NOT NULL;
CREATE TABLE idempotency (
    scope BLOB PRIMARY KEY NOT NULL, fingerprint BLOB NOT NULL, subject TEXT NOT NULL
) STRICT, WITHOUT ROWID;
"""

# `due_time` NULL: nothing is to be done about it any more. While leased it is the end of the lease.
_OWED: Final = """
CREATE TABLE settled (
    job_id TEXT PRIMARY KEY NOT NULL,
    state TEXT NOT NULL,
    ledger_row BLOB NOT NULL,
    reservation BLOB NOT NULL,
    owner TEXT NOT NULL DEFAULT '',
    fence INTEGER NOT NULL DEFAULT 0,
    due_time REAL
) STRICT;
CREATE INDEX settled_due ON settled (due_time) WHERE due_time IS NOT NULL;
CREATE INDEX settled_owned ON settled (owner) WHERE due_time IS NOT NULL AND owner != '';
CREATE TABLE outbox (
    id TEXT PRIMARY KEY NOT NULL,
    subject TEXT NOT NULL,
    tenant TEXT NOT NULL,
    door TEXT NOT NULL,
    is_parent INTEGER NOT NULL,
    state TEXT NOT NULL,
    webhook TEXT NOT NULL,
    created_time REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    fence INTEGER NOT NULL DEFAULT 0,
    next_time REAL,
    delivered_time REAL,
    error TEXT NOT NULL DEFAULT '',
    owner TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX outbox_due ON outbox (next_time) WHERE next_time IS NOT NULL;
CREATE INDEX outbox_dead ON outbox (created_time) WHERE next_time IS NULL AND delivered_time IS NULL;
CREATE INDEX outbox_by_subject ON outbox (subject);
CREATE INDEX outbox_by_time ON outbox (created_time);
CREATE TABLE clock (
    one INTEGER PRIMARY KEY CHECK (one = 1), boot TEXT NOT NULL, steady_us INTEGER NOT NULL, time_us INTEGER NOT NULL
) STRICT;
"""

STEPS: Final = (
    _JOB
    + _TURNS
    + _PARENTS
    + _OWED
    + "".join(f"INSERT INTO tally (state) VALUES ('{state}');" for state in ALL_STATES),  # noqa: S608 - own names
)


LEASES: Final = "SELECT 1 FROM job WHERE lease_until_time IS NOT NULL LIMIT 1"


class JobRow(msgspec.Struct):
    """A row of `job`, in the order of its columns."""

    seq: int
    id: str
    tenant: str
    key_id: str
    lane: str
    line: str
    model: str
    path: str
    door: str
    job_class: int
    is_stream: int
    state: State
    fence: int
    attempts: int
    max_attempts: int
    runs: int
    deaths: int
    submitted_time: float
    queued_time: float
    expires_time: float
    due_time: float
    keep_s: float
    body_bytes: int
    estimate: int
    charged: int
    started_time: float | None
    finished_time: float | None
    not_before_time: float | None
    owner: str
    lease_until_time: float | None
    parent: str
    position: int
    reference: str
    webhook: str
    status: int
    result_bytes: int
    error: str
    cost_nanousd: int | None
    usage: bytes
    details: bytes
    replay_of: str
    replayed_as: str
    is_purged: int
    events: int
    scope: bytes | None
    history: str

    @property
    def is_ready(self) -> bool:
        """Somebody may claim it."""
        return self.state == "queued" and self.not_before_time is None

    @property
    def is_leased(self) -> bool:
        return self.lease_until_time is not None

    @property
    def is_waiting(self) -> bool:
        """It counts towards its tenant's caps."""
        return self.state in {"queued", "staged"}


_SAME: Final = tuple(name for name in Job.__struct_fields__ if name in JobRow.__struct_fields__)
_FLAGS: Final = frozenset({"is_stream", "is_purged"})


def job_of(row: JobRow) -> Job:
    """As everybody else sees it."""
    values = {name: getattr(row, name) for name in _SAME}
    values["job_class"] = CLASSES[row.job_class]
    for name in _FLAGS:
        values[name] = bool(values[name])
    return Job(**values)


def job_rows(connection: Connection, query: str, values: tuple[Any, ...]) -> list[JobRow]:
    """What a `SELECT * FROM job` finds."""
    found: list[tuple[Any, ...]] = connection.execute(query, values).fetchall()
    return [JobRow(*record) for record in found]


def find(connection: Connection, job_id: str, tenant: str = "") -> JobRow | None:
    """ "" as tenant: anybody's."""
    for row in job_rows(connection, "SELECT * FROM job WHERE id = ?", (job_id,)):
        return row if tenant in {"", row.tenant} else None
    return None


class ParentRow(msgspec.Struct):
    """A row of `parent`, in the order of its columns; `counts` has the rest of them."""

    seq: int
    id: str
    tenant: str
    key_id: str
    door: str
    state: str
    is_finalized: int
    fence: int
    owner: str
    lease_until_time: float | None
    created_time: float
    expires_time: float
    due_time: float | None
    keep_s: float
    released_time: float | None
    settled_time: float | None
    cancelled_time: float | None
    finished_time: float | None
    is_stopping: int
    webhook: str
    details: bytes
    scope: bytes | None
    total: int
    counts: dict[str, int]


_PARENT_COLUMNS: Final = len(ParentRow.__struct_fields__) - 1
_SAME_PARENT: Final = tuple(n for n in Parent.__struct_fields__ if n != "is_finalized")


def find_parent(connection: Connection, parent_id: str, tenant: str = "") -> ParentRow | None:
    """ "" as tenant: anybody's."""
    for record in connection.execute("SELECT * FROM parent WHERE id = ?", (parent_id,)):
        row = parent_row(record)
        return row if tenant in {"", row.tenant} else None
    return None


def parent_row(record: tuple[Any, ...]) -> ParentRow:
    counts: dict[str, int] = {s: n for s, n in zip(ALL_STATES, record[_PARENT_COLUMNS:], strict=True) if n}
    values = dict(zip(ParentRow.__struct_fields__, record[:_PARENT_COLUMNS], strict=False))
    return ParentRow(**values, counts=counts)


def parent_of(row: ParentRow) -> Parent:
    """As everybody else sees it."""
    values = {name: getattr(row, name) for name in _SAME_PARENT}
    return Parent(is_finalized=bool(row.is_finalized), **values)
