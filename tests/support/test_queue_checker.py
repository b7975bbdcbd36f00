"""The judge itself: an innocent history passes, and each crime is found under its own number."""

from collections.abc import Callable

import msgspec
import pytest

from gateway.overflow.job import Job, OutboxRow
from tests.support.queue_checker import Billed, Evidence, Read, Submit, Told, amplification, faults

NOW = 1000.0
RESULT = b'{"usage":{}}'


def job(job_id: str, state: str, *steps: str, **changes) -> Job:
    """A step: `state fence owner`."""
    history = "".join(f"{n}.0 {step} because\n" for n, step in enumerate(("queued 0 -", *steps)))
    fields = {
        "tenant": "acme",
        "key_id": "k",
        "lane": "m",
        "model": "m",
        "path": "/v1/chat/completions",
        "door": "job",
        "job_class": "flex",
        "is_stream": False,
        "fence": sum(step.startswith("running") for step in steps),
        "attempts": 0,
        "max_attempts": 5,
        "runs": sum(step.startswith("running") for step in steps),
        "deaths": 0,
        "submitted_time": 0.0,
        "expires_time": 900.0,
        "keep_s": 3600.0,
        "body_bytes": 10,
        "estimate": 1,
        "history": history,
        **changes,
    }
    return Job(id=job_id, state=state, **fields)


def row(row_id: str, subject: str, state: str) -> OutboxRow:
    return OutboxRow(
        id=row_id,
        subject=subject,
        tenant="acme",
        door="job",
        is_parent=False,
        state=state,
        webhook="we_1",
        created_time=5.0,
    )


def innocent() -> Evidence:
    """One that succeeded at the second run, one cancelled while it waited, one cancelled while it ran."""
    done = job(
        "job_a",
        "succeeded",
        "running 1 w1",
        "queued 1 -",
        "running 2 w2",
        "succeeded 2 w2",
        cost_nanousd=70,
        webhook="we_1",
    )
    return Evidence(
        submits=[
            Submit(1, "", "key"),
            Submit(1, "job_a", "key"),
            Submit(2, "job_b"),
            Submit(3, "job_c"),
            Submit(4),
        ],
        reads=[
            Read("job_a", "queued"),
            Read("job_a", "succeeded", RESULT),
            Read("job_a", "succeeded", RESULT),
        ],
        begun=[("job_a.1", 1), ("job_a.2", 1), ("job_c.1", 3)],
        finished={"job_a.2"},
        ledger=[Billed("job_a", 70), Billed("job_c", 3), Billed("req_1", 9)],
        jobs=[
            done,
            job("job_b", "cancelled", "cancelled 0 -"),
            job("job_c", "cancelled", "running 1 w1", "cancelling 1 w1", "cancelled 1 w1"),
        ],
        results={"job_a": RESULT},
        outbox=[row("msg_1", "job_a", "succeeded")],
        told=[Told("msg_1", "job_a", "job.succeeded"), Told("msg_1", "job_a", "job.succeeded")],
        serials={"job_a": 1, "job_b": 2, "job_c": 3},
        prices={1: 70, 2: 80, 3: 90},
        now_time=NOW,
        is_told=True,
    )


def changed(evidence: Evidence, number: int, **changes) -> None:
    evidence.jobs[number] = msgspec.structs.replace(evidence.jobs[number], **changes)


def steps(*text: str) -> str:
    return "".join(f"{n}.0 {step} because\n" for n, step in enumerate(text))


CRIMES: list[tuple[str, Callable[[Evidence], object]]] = [
    ("I1", lambda e: e.jobs.pop(1)),
    ("I1", lambda e: changed(e, 1, state="queued", history=steps("queued 0 -"))),
    ("I1", lambda e: e.serials.update(job_b=3)),
    ("I2", lambda e: changed(e, 1, state="expired")),
    ("I2", lambda e: changed(e, 1, history="")),
    ("I2", lambda e: changed(e, 1, history=steps("queued 0 -", "cancelled 0 -", "cancelled 0 -"))),
    (
        "I2",
        lambda e: changed(
            e, 2, history=steps("queued 0 -", "running 1 w1", "cancelled 1 w1", "cancelled 1 w1")
        ),
    ),
    ("I2", lambda e: changed(e, 1, state="succeeded", history=steps("queued 0 -", "succeeded 0 -"))),
    ("I2", lambda e: e.reads.append(Read("job_a", "running"))),
    ("I2", lambda e: e.reads.append(Read("job_b", "failed"))),
    ("I3", lambda e: e.reads.append(Read("job_a", "succeeded", b"{}"))),
    ("I3", lambda e: e.results.clear()),
    ("I3", lambda e: e.results.update(job_a=b"other")),
    ("I3", lambda e: e.finished.clear()),
    ("I4", lambda e: e.ledger.append(Billed("job_a", 70))),
    ("I4", lambda e: e.ledger.append(Billed("job_a.1", 70))),
    ("I4", lambda e: e.ledger.append(Billed("job_z", 70))),
    ("I4", lambda e: e.ledger.pop(0)),
    ("I4", lambda e: e.ledger.__setitem__(0, Billed("job_a", 71))),
    ("I4", lambda e: changed(e, 0, cost_nanousd=71)),
    ("I5", lambda e: (e.jobs.append(job("job_d", "cancelled", "cancelled 0 -")), e.serials.update(job_d=1))),
    ("I5", lambda e: (e.jobs.append(job("job_d", "cancelled", "cancelled 0 -")), e.serials.update(job_d=99))),
    ("I5", lambda e: e.submits.append(Submit(1, "job_b", "key"))),
    ("I6", lambda e: e.ledger.append(Billed("job_b", 1))),
    ("I6", lambda e: e.begun.append(("job_b.1", 2))),
    ("I7", lambda e: e.begun.append(("job_a.2", 1))),
    ("I7", lambda e: e.begun.append(("job_a.3", 1))),
    ("I7", lambda e: e.begun.append(("job_c.1", 1))),
    (
        "I7",
        lambda e: changed(
            e, 0, history=steps("queued 0 -", "running 1 w1", "queued 1 -", "running 1 w2", "succeeded 1 w2")
        ),
    ),
    (
        "I7",
        lambda e: changed(
            e, 0, history=steps("queued 0 -", "running 2 w1", "queued 2 -", "running 1 w2", "succeeded 1 w2")
        ),
    ),
    ("I8", lambda e: setattr(e, "held", 1)),
    ("I8", lambda e: setattr(e, "unsettled", 1)),
    ("I9", lambda e: (e.outbox.clear(), e.told.clear())),
    ("I9", lambda e: e.outbox.append(row("msg_2", "job_a", "succeeded"))),
    ("I9", lambda e: e.outbox.__setitem__(0, row("msg_1", "job_a", "failed"))),
    ("I9", lambda e: e.told.clear()),
    ("I9", lambda e: e.told.append(Told("msg_9", "job_a", "job.succeeded"))),
    ("I9", lambda e: e.told.append(Told("msg_1", "job_b", "job.succeeded"))),
    ("I10", lambda e: e.jobs.append(job("job_d", "queued"))),
]


def test_an_innocent_history_passes():
    assert faults(innocent()) == []
    assert amplification(innocent()) == 1.5


@pytest.mark.parametrize(("number", "commit"), CRIMES, ids=range(len(CRIMES)))
def test_each_crime_is_found_under_its_number(number, commit):
    evidence = innocent()
    commit(evidence)
    found = {fault.partition(":")[0] for fault in faults(evidence)}
    assert number in found, found
