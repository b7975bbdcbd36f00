"""Jobs, parents and numbers between Python and the scripts of the queue in Redis: who is called what, and what is a number.

Knows the scripts' argument and answer forms; refuses to know connections and journals.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from gateway.overflow.job import (
    ALL_STATES,
    IdempotencyKey,
    LaneStats,
    Lease,
    NewJob,
    NewParent,
    OutboxRow,
    Parent,
    ParentLease,
    QueueStats,
    TenantLimits,
)
from gateway.stores.queue_jobs import Answer, Stored, job_bytes
from gateway.stores.queue_schema import CLASSES, JobRow, ParentRow, parent_of

# A job whose scope Redis keeps with the fingerprint: hex, a colon, hex.
_Convert = Callable[[bytes], Any]
_JOB: Final = msgspec.structs.fields(JobRow)
JOB_FIELDS: Final = tuple(field.name for field in _JOB)
_PARENT: Final = tuple(f for f in msgspec.structs.fields(ParentRow) if f.name != "counts")
NEWS_FIELDS: Final = OutboxRow.__struct_fields__
# What tells a job to Redis again, beside what is binary.
PLAIN: Final = (
    "id",
    "tenant",
    "key_id",
    "lane",
    "model",
    "path",
    "door",
    "job_class",
    "is_stream",
    "max_attempts",
    "keep_s",
    "body_bytes",
    "estimate",
    "reference",
    "webhook",
    "submitted_time",
    "expires_time",
    "parent",
    "position",
    "replay_of",
)


def _converter(annotation: Any) -> _Convert:
    kinds = getattr(annotation, "__args__", (annotation,))
    if bool in kinds:
        return lambda value: value == b"1"
    if int in kinds:
        return int
    if float in kinds:
        return float
    return bytes if bytes in kinds else bytes.decode


_JOB_CONVERT: Final = tuple(_converter(field.type) for field in _JOB)
_PARENT_CONVERT: Final = tuple(_converter(field.type) for field in _PARENT)
_NEWS: Final = msgspec.structs.fields(OutboxRow)
_NEWS_CONVERT: Final = tuple(_converter(field.type) for field in _NEWS)


def unpacked(packed: bytes) -> list[bytes | None]:
    """The fields of a text: their lengths (-1: there is none), a semicolon, the fields."""
    lengths, _, content = packed.partition(b";")
    fields: list[bytes | None] = []
    at = 0
    for length in map(int, lengths.split(b",")):
        if length < 0:
            fields.append(None)
        else:
            fields.append(content[at : at + length])
            at += length
    return fields


def payload_of(packed: bytes) -> list[bytes]:
    """Body, headers, caller, reservation and what was carried; empty when it is gone."""
    return [field for field in unpacked(packed) if field is not None]


def job_row(packed: bytes) -> JobRow:
    """From the texts of JOB_FIELDS."""
    pairs = zip(_JOB_CONVERT, unpacked(packed), strict=True)
    fields: list[Any] = [None if value is None else convert(value) for convert, value in pairs]
    return JobRow(*fields)


def parent_from(packed: bytes) -> Parent:
    """From the texts of a parent's fields, and its counts."""
    values = unpacked(packed)
    own = len(_PARENT)
    fields: dict[str, Any] = {
        field.name: None if value is None else convert(value)
        for field, convert, value in zip(_PARENT, _PARENT_CONVERT, values[:own], strict=True)
    }
    counts: dict[str, int] = {
        state: int(n) for state, n in zip(ALL_STATES, values[own:], strict=True) if n and int(n)
    }
    return parent_of(ParentRow(counts=counts, **fields))


def news_from(packed: bytes) -> OutboxRow:
    pairs = zip(_NEWS, _NEWS_CONVERT, unpacked(packed), strict=True)
    fields: dict[str, Any] = {f.name: None if v is None else convert(v) for f, convert, v in pairs}
    return OutboxRow(**fields)


def plain_job(job: NewJob) -> dict[str, Any]:
    """As the scripts take a new one."""
    plain: dict[str, Any] = {
        "id": job.id,
        "tenant": job.tenant,
        "key_id": job.key_id,
        "lane": job.lane,
        "model": job.model,
        "path": job.path,
        "door": job.door,
        "job_class": CLASSES.index(job.job_class),
        "is_stream": int(job.is_stream),
        "max_attempts": job.max_attempts,
        "expires_in_s": job.expires_in_s,
        "keep_s": job.keep_s,
        "body_bytes": job_bytes(job),
        "estimate": max(1, job.estimate),
        "reference": job.reference,
        "webhook": job.webhook,
    }
    return _with_scope(plain, job.idempotency)


def plain_parent(parent: NewParent) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "id": parent.id,
        "tenant": parent.tenant,
        "key_id": parent.key_id,
        "door": parent.door,
        "is_finalized": int(parent.is_finalized),
        "expires_in_s": parent.expires_in_s,
        "keep_s": parent.keep_s,
        "webhook": parent.webhook,
        "announces": parent.announces,
    }
    return _with_scope(plain, parent.idempotency)


def _with_scope(plain: dict[str, Any], key: IdempotencyKey | None) -> dict[str, Any]:
    if key is not None:
        plain["scope"] = f"{key.scope.hex()}:{key.fingerprint.hex()}"
    return plain


def plain_again(row: JobRow) -> dict[str, Any]:
    """As the scripts take one that was there before."""
    plain = {name: getattr(row, name) for name in PLAIN}
    if row.scope is not None:
        plain["scope"] = row.scope.decode()
    return plain


def plain_limits(limits: TenantLimits) -> dict[str, Any]:
    return msgspec.structs.asdict(limits)


def lane_from(values: Sequence[bytes]) -> LaneStats:
    flex, batch, running, delayed, tenants, solitary = (int(value) for value in values[:6])
    oldest, rate = values[6:]
    return LaneStats(
        queued=flex + batch + delayed,
        delayed=delayed,
        solitary=solitary,
        queued_flex=flex,
        queued_batch=batch,
        running=running,
        tenants=tenants,
        oldest_queued_time=float(oldest) if oldest else None,
        finished_per_s=float(rate),
    )


def stats_from(answer: Sequence[Any]) -> QueueStats:
    now, lanes, tally, due, waiting, dead, unsettled = answer
    jobs = {state.decode(): int(n) for state, n in zip(tally[::2], tally[1::2], strict=True)}
    return QueueStats(
        lanes={lane.decode(): lane_from(values) for lane, values in sorted(lanes)},
        states={state: n for state, n in jobs.items() if n},
        outbox_due=due,
        outbox_waiting=waiting,
        outbox_dead=dead,
        unsettled=unsettled,
        now_time=float(now),
    )


def lease_words(lease: Lease | ParentLease) -> tuple[str, int, str]:
    subject = lease.job_id if isinstance(lease, Lease) else lease.parent_id
    return subject, lease.fence, lease.owner


def job_binary(stored: Stored) -> tuple[bytes, ...]:
    job = stored.job
    return stored.body, stored.headers, job.caller, job.reservation, job.details


def end_words(
    lease: Lease, answer: Answer | None, error: str, units: int | None, cost_nanousd: int | None
) -> dict[str, Any]:
    kept = None if answer is None else {"status": answer.status, "size": answer.size, "file": answer.file}
    return {
        "lease": lease_words(lease),
        "answer": kept,
        "error": error,
        "units": units,
        "cost_nanousd": cost_nanousd,
    }


def end_binary(answer: Answer | None, ledger_row: bytes, usage: bytes) -> tuple[bytes, ...]:
    if answer is None:
        return b"", b"", ledger_row, usage
    return answer.headers, answer.body, ledger_row, usage
