"""What the end of a run means for its job: whether it is tried again, when, and whether it counts."""

import time
from types import SimpleNamespace

import pytest

from backends.dialect import CHAT
from backends.usage import Usage
from gateway.ledger_row import LedgerRow
from gateway.overflow.job import Claimed, Job, Lease
from gateway.overflow.running import LONGEST_RETRY_S, Run, Runner, failure_of, read_row
from gateway.overflow.stand_in import Transcript, read_head_event, stand_in
from gateway.overflow.store import LeaseLostError
from policies.engine_priority import engine_priority
from policies.exchange import Caller, Exchange
from tests.mutants import drawing as mutants


def job(**changes):
    values = {
        "id": "job_1", "tenant": "t", "key_id": "k", "lane": "m", "model": "m", "path": CHAT.path, "door": "job",
        "job_class": "flex", "is_stream": False, "state": "running", "fence": 1, "attempts": 0, "max_attempts": 5,
        "runs": 1, "deaths": 0, "submitted_time": 0.0, "expires_time": 1e9, "keep_s": 60.0, "body_bytes": 2, "estimate": 1,
    }  # fmt: skip
    return Job(**values | changes)


def judged(ended, status, *headers, draw=0.5, kind="", body=b'{"error": {"message": "no"}}', **changes):
    exchange = Exchange("job_1.1", CHAT, time.perf_counter(), time.time())
    exchange.ended, exchange.status, exchange.error_kind = ended, status, kind
    transcript = Transcript(10_000)
    if status:
        transcript.begin(status, headers, is_stream=False)
        transcript.add(body)
    return failure_of(exchange, transcript, job(**changes), draw)


@pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 409, 413, 422])
def test_an_answer_ends_the_job_whatever_it_says(status):
    assert judged("completed", status) is None


@pytest.mark.parametrize("status", [408, 500, 502, 504])
def test_a_servers_fault_is_an_attempt(status):
    assert judged("completed", status).is_counted


@pytest.mark.parametrize("ended", ["upstream_failed", "incomplete", "failed"])
def test_so_is_an_answer_that_did_not_come_or_did_not_end(ended):
    assert judged(ended, 502 if ended == "upstream_failed" else 200).is_counted


@pytest.mark.parametrize("status", [429, 503, 529])
def test_a_lack_of_room_is_none_and_comes_again_when_it_said(status):
    failure = judged("completed", status, (b"retry-after", b"7"))
    assert (failure.is_counted, failure.retry_in_s) == (False, 7.0)
    assert judged("completed", status, (b"retry-after", b"7"), (b"retry-after-ms", b"6500")).retry_in_s == 6.5
    assert not judged("completed", status).is_counted


def test_without_a_word_on_when_it_comes_again_later_and_later():
    waits = [judged("completed", 429, runs=runs, draw=1.0).retry_in_s for runs in (1, 2, 4, 30)]
    assert waits == sorted(waits)
    assert waits[-1] <= LONGEST_RETRY_S + 1


@pytest.mark.parametrize("code", ["pool_full", "no_endpoint", "wait_timeout"])
def test_no_room_of_ours_is_no_attempt(code):
    failure = judged("denied", 429, kind=code)
    assert (failure.is_counted, failure.retry_in_s < 2) == (False, True)


def test_a_limit_of_ours_is_waited_for():
    failure = judged("denied", 429, (b"retry-after", b"120"), kind="rate_limit_exceeded")
    assert not failure.is_counted
    assert 120 <= failure.retry_in_s <= 132


@pytest.mark.parametrize(
    ("status", "kind"), [(403, "model_not_allowed"), (404, "model_not_found"), (400, "invalid_field")]
)
def test_what_a_policy_refuses_for_good_ends_the_job(status, kind):
    assert judged("denied", status, kind=kind) is None


def test_attempts_come_again_with_full_jitter_from_one_second_to_sixty():
    for attempts in range(8):
        bound = min(60.0, 2.0 ** (attempts + 1))
        assert judged("completed", 500, attempts=attempts, draw=0.0).retry_in_s == 1.0
        assert judged("completed", 500, attempts=attempts, draw=1.0).retry_in_s == bound


def test_its_caller_is_told_the_upstreams_word_in_one_line():
    assert judged("completed", 500, body=b'{"error": {"message": "it\\nbroke"}}').error == "it broke"
    assert judged("completed", 500, body=b"<html>").error == "status 500"
    assert judged("upstream_failed", 0, kind="reset").error == "reset"


def test_what_is_answered_to_a_stand_in_is_kept_event_by_event():
    transcript = Transcript(10_000, is_journaled=True)
    request = stand_in(CHAT.path, {}, transcript)
    assert request.is_gone
    request.start(200, [(b"content-type", b"text/event-stream"), (b"x-request-id", b"job_1.1")])
    for piece in (b"data: 1\n", b"\ndata: 2\n\ndata: 3\r\n\r\nda", b"ta: 4"):
        request.write(piece)
    head, *events = transcript.take_events()
    assert read_head_event(head) == (200, [(b"content-type", b"text/event-stream")])
    assert events == [b"data: 1\n\n", b"data: 2\n\n", b"data: 3\r\n\r\n"]
    request.write(b"\n\n")
    request.finish()
    assert transcript.take_events(is_last=True) == [b"data: 4\n\n"]
    assert all(read_head_event(event) is None for event in (b"200 is data\n\n", b"data: 1\n\n"))


def test_an_answer_beyond_the_limit_is_not_kept_in_part():
    transcript = Transcript(10)
    request = stand_in(CHAT.path, {}, transcript)
    request.respond(200, [], b"x" * 11)
    assert transcript.is_too_large
    assert transcript.body == b""


def _row_of(exchange):
    received_us = int(exchange.received_time * 1e6)
    return LedgerRow(
        exchange.request_id, received_us, "w", "k", "k", "", "[]", 0, "chat", False, "m", "p", "p", "e"
    )


class _Service:
    """A runner whose store says `ends` to every end of a run; `concluded` is what its caller pays in the end."""

    def __init__(self, ends):
        self.concluded, self.wasted, self.outcomes, self.ends = [], [], [], ends
        self.priorities = []
        settler = SimpleNamespace(
            conclude=lambda exchange, _: self.concluded.append((exchange.cost_nanousd, exchange.usage)),
            note_waste=lambda _, waste: self.wasted.append(waste.reason),
            row_of_job=_row_of,
        )
        keyring = SimpleNamespace(find_by_id=lambda _: Caller("k", "k"))
        runtime = SimpleNamespace(
            keyring=keyring, ceilings=(1.0, 1.0, 1.0, 1.0), catalog=SimpleNamespace(find=lambda _: None),
            end_users=SimpleNamespace(is_on=False), takes_flex=True, session_headers=(), session_names=frozenset(), session_secret=b"",
        )  # fmt: skip
        self.runner = Runner(self, self._handle, settler, lambda: runtime, lambda _: None)

    async def _handle(self, request, exchange, provider, message):
        self.priorities.append(engine_priority(exchange.priority, is_batch=exchange.is_batch))
        endpoint = SimpleNamespace(name="e")
        target = SimpleNamespace(pool=SimpleNamespace(name="p"))
        exchange.candidate = SimpleNamespace(endpoint=endpoint, target=target)
        exchange.dispatched_at = exchange.sent_at = exchange.ended_at = time.perf_counter()
        exchange.usage, exchange.cost_nanousd = Usage(10, 0, 0, 0, 5), 1000
        exchange.status, exchange.ended = 200, "completed"
        request.respond(200, [(b"content-type", b"application/json")], b'{"usage": {"total_tokens": 15}}')
        exchange.on_priced()

    async def finish(self, lease, outcome):
        self.outcomes.append(outcome)
        return self.ends()

    async def run(self, **changes):
        made = job(**changes)
        claimed = Claimed(
            job=made, lease=Lease(made.id, 1, "w"), body=b'{"model": "m", "messages": []}', headers=b"", caller=b"",
            reservation=b"", carried=b"", is_solitary=False,
        )  # fmt: skip
        return await self.runner.run(Run(claimed, 10_000), waits=False)


async def test_what_the_store_has_taken_is_billed_under_the_jobs_id():
    service = _Service(lambda: job(state="succeeded"))
    ended = await service.run()
    (outcome,) = service.outcomes
    assert (ended.kind, ended.pool, ended.job.state) == ("answered", "p", "succeeded")
    assert read_row(outcome.ledger_row).request_id == "job_1"
    assert (outcome.units, outcome.cost_nanousd, outcome.usage) == (15, 1000, b'{"total_tokens": 15}')
    assert service.concluded == [(1000, Usage(10, 0, 0, 0, 5))]
    assert not service.wasted


async def test_engines_are_told_that_a_batch_waits_for_what_is_flex():
    service = _Service(lambda: job(state="succeeded"))
    for job_class in ("flex", "batch"):
        await service.run(job_class=job_class)
    assert service.priorities == [10, 20]


def _lost():
    raise LeaseLostError("another has it")


async def test_a_run_whose_job_is_anothers_costs_its_caller_nothing():
    service = _Service(_lost)
    assert (await service.run()).job is None
    assert service.concluded == [(0, None)]
    assert service.wasted == ["lease_lost"]


async def test_a_build_that_bills_it_all_the_same_is_caught(monkeypatch):
    mutants.bills_what_it_lost(monkeypatch)
    with pytest.raises(AssertionError):
        await test_a_run_whose_job_is_anothers_costs_its_caller_nothing()
