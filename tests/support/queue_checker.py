"""The judge of the queue's chaos tests: what clients were told, what the upstream did, what is in the ledger and in the job
table, compared after everything has come to rest. Asks nobody and repairs nothing: it reads what witnesses wrote down.

The invariants are those of the queue's promise, I1 to I10, by their numbers:

I1 what was acknowledged is there, and has ended. I2 it ended once, by transitions that exist. I3 what succeeded has one
result, the same at every reading. I4 it is in the ledger once at most, at the price of what the upstream answered. I5 what
was never acknowledged is not there twice. I6 what was cancelled before it began cost nothing and reached no upstream.
I7 no two runs had the same fence. I8 nothing is reserved any more. I9 whoever was to be told was told, under one id.
I10 nothing is older than it may be and has not ended.
"""

import itertools
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gateway.overflow.job import FINAL, Job, OutboxRow

# From each state, where it may go next: the diagram of docs/queue.md. `queued` to itself: its time has come.
NEXT = {
    "staged": {"queued", "cancelled", "expired"},
    "queued": {"running", "queued", "cancelled", "expired"},
    "running": {"succeeded", "failed", "dead", "queued", "cancelling", "cancelled", "expired"},
    "cancelling": {"cancelled", "succeeded", "failed", "dead", "expired"},
}


# Why a job is in a state, where a node said so from its journal.
RESTORED = "restored"
_JOB = re.compile(r"(?:job|resp|batch)_[0-9a-z]+")


class Submit(NamedTuple):
    """One try of a client to hand something in. `job_id` "": it never got an answer."""

    serial: int
    job_id: str = ""
    key: str = ""  # its idempotency key


class Read(NamedTuple):
    """A client looked. `body`: the result as it got it, None before there was one."""

    job_id: str
    state: str
    body: bytes | None = None


class Transition(NamedTuple):
    time: float
    state: str
    fence: int
    owner: str
    reason: str


class Billed(NamedTuple):
    """A row of the ledger, as far as it is compared."""

    request_id: str
    cost_nanousd: int | None


class Told(NamedTuple):
    """A webhook that arrived and was answered well."""

    message_id: str
    subject: str
    kind: str


@dataclass
class Evidence:
    """What the witnesses say. A job is known to clients by its id and to the upstream by its serial number."""

    submits: list[Submit] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    begun: list[tuple[str, int]] = field(default_factory=list)  # the upstream's: request id, serial
    finished: set[str] = field(default_factory=set)  # request ids whose answer went out whole
    ledger: list[Billed] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    results: dict[str, bytes] = field(default_factory=dict)  # by job
    outbox: list[OutboxRow] = field(default_factory=list)
    told: list[Told] = field(default_factory=list)
    serials: dict[str, int] = field(default_factory=dict)  # by job
    prices: dict[int, int] = field(default_factory=dict)  # by serial, in nano-dollars
    held: int = 0  # what limits still have reserved
    unsettled: int = 0  # rows that wait for the ledger
    now_time: float = 0.0
    is_told: bool = False  # whether somebody was there to be told
    forgets: bool = False  # the store may have lost something: jobs are restored, and runs counted anew


def transitions(job: Job) -> list[Transition]:
    found = []
    for line in job.history.splitlines():
        time, state, fence, owner, reason = line.split(" ", 4)
        found.append(Transition(float(time), state, int(fence), owner, reason))
    return found


def faults(evidence: Evidence) -> list[str]:
    """A sentence for everything that should not be, each beginning with the invariant it breaks."""
    found: list[str] = []
    jobs = {job.id: job for job in evidence.jobs}
    runs = _runs(evidence.begun)
    for check in (_acknowledged, _unacknowledged, _read_alike, _ledger_alone, _told):
        found += check(evidence, jobs)
    for job in evidence.jobs:
        found += _history(job)
        found += _ended_in_time(job, evidence.now_time)
        found += _billed(job, evidence, has_begun=_has_begun(job) or (evidence.forgets and job.id in runs))
        found += _run_as_asked(job, runs.get(job.id, []), evidence)
        if not evidence.forgets:
            found += _run_once(job, runs.get(job.id, []))
    if evidence.held:
        found.append(f"I8: {evidence.held} are still reserved")
    if evidence.unsettled:
        found.append(f"I8: {evidence.unsettled} ends still wait for the ledger")
    return found


def amplification(evidence: Evidence) -> float:
    """Requests that the upstream got for each job that it was asked to do."""
    serials = Counter(serial for _, serial in evidence.begun)
    return sum(serials.values()) / max(1, len(serials))


def _runs(begun: Iterable[tuple[str, int]]) -> dict[str, list[tuple[int, int]]]:
    """By job: (run, serial). An id that is not `<job>.<run>` was no job's."""
    found = defaultdict(list)
    for request_id, serial in begun:
        job_id, dot, run = request_id.rpartition(".")
        if dot and run.isdecimal():
            found[job_id].append((int(run), serial))
    return found


def _acknowledged(evidence: Evidence, jobs: dict[str, Job]) -> Iterator[str]:
    for submit in evidence.submits:
        if not submit.job_id:
            continue
        job = jobs.get(submit.job_id)
        if job is None:
            yield f"I1: {submit.job_id} was acknowledged (serial {submit.serial}) and is lost"
        elif job.state not in FINAL:
            yield f"I1: {submit.job_id} was acknowledged and is {job.state} for ever"
        elif evidence.serials.get(job.id, submit.serial) != submit.serial:
            yield f"I1: {submit.job_id} is of request {evidence.serials[job.id]}, not {submit.serial}"


def _unacknowledged(evidence: Evidence, jobs: dict[str, Job]) -> Iterator[str]:
    del jobs
    known = defaultdict(set)
    for job_id, serial in evidence.serials.items():
        known[serial].add(job_id)
    tries = Counter(submit.serial for submit in evidence.submits)
    keys = {submit.serial: submit.key for submit in evidence.submits}
    for serial, ids in known.items():
        if serial not in tries:
            yield f"I5: {sorted(ids)} are of request {serial}, which nobody sent"
        elif len(ids) > (1 if keys[serial] else tries[serial]):
            yield f"I5: request {serial}, sent {tries[serial]} times, became {len(ids)} jobs"
    by_key = defaultdict(set)
    for submit in evidence.submits:
        if submit.key and submit.job_id:
            by_key[submit.key].add(submit.job_id)
    yield from (
        f"I5: key {key} was answered with {sorted(ids)}" for key, ids in by_key.items() if len(ids) > 1
    )


def _history(job: Job) -> Iterator[str]:
    steps = transitions(job)
    if not steps or steps[-1].state != job.state:
        yield f"I2: {job.id} is {job.state}, and its history ends otherwise: {job.history!r}"
        return
    ends = [step.state for step in steps if step.state in FINAL]
    if len(ends) > 1:
        yield f"I2: {job.id} ended {len(ends)} times: {ends}"
    for before, after in itertools.pairwise(steps):
        if after.state not in NEXT.get(before.state, set()) and after.reason != RESTORED:
            yield f"I2: {job.id} went from {before.state} to {after.state}"
        if after.fence < before.fence:
            yield f"I7: {job.id}: the fence fell from {before.fence} to {after.fence}"
    fences = Counter(step.fence for step in steps if step.state == "running")
    yield from (
        f"I7: {job.id} was run {times} times with fence {fence}"
        for fence, times in fences.items()
        if times > 1
    )
    owners = defaultdict(set)
    for step in steps:
        if step.state == "running" and step.owner != "-":
            owners[step.fence].add(step.owner)
    yield from (
        f"I7: {job.id}: fence {fence} had owners {sorted(who)}"
        for fence, who in owners.items()
        if len(who) > 1
    )


def _ended_in_time(job: Job, now_time: float) -> Iterator[str]:
    if job.state not in FINAL and job.expires_time < now_time:
        yield f"I10: {job.id} is {job.state}, {now_time - job.expires_time:.0f} s after its expiry"


def _read_alike(evidence: Evidence, jobs: dict[str, Job]) -> Iterator[str]:
    seen: dict[str, bytes] = {}
    for read in evidence.reads:
        if read.body is None:
            continue
        job = jobs.get(read.job_id)
        if job is None:
            yield f"I3: {read.job_id} was read, and is not there"
        elif seen.setdefault(read.job_id, read.body) != read.body:
            yield f"I3: {read.job_id} was read as two different results"
        elif job.state == "succeeded" and evidence.results.get(job.id, read.body) != read.body:
            yield f"I3: {read.job_id} was read as another result than is kept"
    ended: dict[str, str] = {}
    for read in evidence.reads:
        before = ended.get(read.job_id, read.state)
        if read.state in FINAL:
            ended[read.job_id] = before
        if before != read.state:
            yield f"I2: {read.job_id} was read as {ended[read.job_id]}, later as {read.state}"
    for job_id, state in ended.items():
        if job_id in jobs and jobs[job_id].state != state:
            yield f"I2: {job_id} was read as {state} and is {jobs[job_id].state}"
    for job in jobs.values():
        if job.state == "succeeded" and not job.is_purged and job.id not in evidence.results:
            yield f"I3: {job.id} succeeded and has no result"


def _ledger_alone(evidence: Evidence, jobs: dict[str, Job]) -> Iterator[str]:
    rows = Counter(row.request_id for row in evidence.ledger)
    for request_id, times in rows.items():
        job_id = _JOB.match(request_id)
        if times > 1:
            yield f"I4: {request_id} is in the ledger {times} times"
        if job_id is None:
            continue  # of a request that was none
        if job_id[0] not in jobs:
            yield f"I4: {request_id} is in the ledger, and no job"
        if job_id[0] != request_id:
            yield f"I4: {job_id[0]} is in the ledger as {request_id}, too"


def _has_begun(job: Job) -> bool:
    return any(step.state == "running" for step in transitions(job))


def _billed(job: Job, evidence: Evidence, *, has_begun: bool) -> Iterator[str]:
    rows = [row for row in evidence.ledger if row.request_id == job.id]
    if job.state == "succeeded":
        due = evidence.prices.get(evidence.serials.get(job.id, -1))
        if not rows:
            yield f"I4: {job.id} succeeded and was not billed"
        elif due is not None and rows[0].cost_nanousd != due:
            yield f"I4: {job.id} was billed {rows[0].cost_nanousd} instead of {due}"
        if due is not None and job.cost_nanousd != due:
            yield f"I4: {job.id} says that it cost {job.cost_nanousd} instead of {due}"
    elif job.state in FINAL and not has_begun:
        number = 6 if job.state == "cancelled" else 4
        if any(row.cost_nanousd for row in rows):
            yield f"I{number}: {job.id} was {job.state} before it began, and billed"


def _run_once(job: Job, runs: list[tuple[int, int]]) -> Iterator[str]:
    if runs and not _has_begun(job):
        number = 6 if job.state == "cancelled" else 7
        yield f"I{number}: {job.id} never began, and the upstream got it"
    for run, times in Counter(run for run, _ in runs).items():
        if times > 1:
            yield f"I7: the upstream got run {run} of {job.id} {times} times"
        if not 1 <= run <= job.runs:
            yield f"I7: the upstream got run {run} of {job.id}, which had {job.runs}"


def _run_as_asked(job: Job, runs: list[tuple[int, int]], evidence: Evidence) -> Iterator[str]:
    for _, serial in runs:
        if evidence.serials.get(job.id, serial) != serial:
            yield f"I7: the upstream got request {serial} under the id of {job.id}"
    if job.state == "succeeded" and runs:
        finished = [run for run, _ in runs if f"{job.id}.{run}" in evidence.finished]
        if not finished:
            yield f"I3: {job.id} succeeded, and the upstream had not ended an answer"


def _told(evidence: Evidence, jobs: dict[str, Job]) -> Iterator[str]:
    rows = defaultdict(list)
    for row in evidence.outbox:
        rows[row.subject].append(row)
    for job in jobs.values():
        if job.state not in FINAL:
            if any(row.state in FINAL for row in rows[job.id]):
                yield f"I9: {job.id} is {job.state}, and its end was announced"
            continue
        ends = Counter(row.webhook for row in rows[job.id] if row.state == job.state)
        for webhook in job.webhook.split():
            if ends[webhook] != 1:
                yield f"I9: {job.id} has {ends[webhook]} rows of news for {webhook}"
        others = {row.state for row in rows[job.id] if row.state in FINAL} - {job.state}
        if others:
            yield f"I9: {job.id} is {job.state}, and was announced as {sorted(others)}"
    if not evidence.is_told:
        return
    arrived = Counter(told.message_id for told in evidence.told)
    known = {row.id: row for row in evidence.outbox}
    yield from (
        f"I9: {row.id} ({row.subject}) was never delivered" for row in known.values() if not arrived[row.id]
    )
    for told in evidence.told:
        row = known.get(told.message_id)
        if row is None:
            yield f"I9: {told.message_id} was delivered and is in no outbox"
        elif told.subject != row.subject:
            yield f"I9: {told.message_id} was delivered for {told.subject} instead of {row.subject}"


def usage_of(result: bytes) -> dict[str, Any]:
    """Of an answer, as its dialect reports it."""
    usage: dict[str, Any] = json.loads(result).get("usage", {})
    return usage
