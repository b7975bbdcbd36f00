"""One suite for both stores of jobs: what the contract in gateway/overflow/store.py promises."""

import asyncio

import pytest

from gateway.overflow.job import FINAL, LEASE_S, JobFilter, TenantLimits
from gateway.overflow.store import (
    FORGET_S,
    LARGEST_BYTES,
    IdempotencyConflictError,
    LeaseLostError,
    OutOfOrderError,
    QueueFullError,
    ResultTooLargeError,
)
from tests.support.queue_jobs import LANE, NO_LIMITS, a_failure, a_job, a_key, an_answer

OWNER = "node/worker/1"


async def submit(queue, *names, tenant="t1", **others):
    for name in names:
        await queue.store.submit(a_job(name, tenant, **others), NO_LIMITS)


async def claim(queue, owner=OWNER, **others):
    claimed = await queue.store.claim(LANE, owner, **others)
    assert claimed is not None
    return claimed


async def claimed_ids(queue, count, lane=LANE):
    found = [await queue.store.claim(lane, OWNER) for _ in range(count)]
    return [each.job.id for each in found if each is not None]


# -- one life


async def test_a_job_is_submitted_claimed_and_finished_and_everybody_sees_the_same(queue):
    made = await queue.store.submit(
        a_job("job_a", body=b"\x00body", headers=b"h", caller=b"c", details=b"d", reservation=b"r"), NO_LIMITS
    )
    assert made.is_new
    assert (made.job.state, made.job.fence, made.job.body_bytes) == ("queued", 0, 6)
    claimed = await queue.other.claim(LANE, OWNER)
    assert (claimed.body, claimed.headers, claimed.caller) == (b"\x00body", b"h", b"c")
    assert (claimed.reservation, claimed.carried, claimed.is_solitary) == (b"r", b"", False)
    assert (claimed.job.state, claimed.job.runs) == ("running", 1)
    assert (claimed.lease.job_id, claimed.lease.owner) == ("job_a", OWNER)
    assert claimed.lease.fence == claimed.job.fence > 0
    queue.clock.forward(2)
    ended = await queue.other.finish(claimed.lease, an_answer(b"\xffanswer", usage=b"{}"))
    assert (ended.state, ended.status, ended.result_bytes, ended.cost_nanousd) == ("succeeded", 200, 7, 7)
    found = await queue.store.get("t1", "job_a")
    assert found == ended
    assert found.finished_time - found.started_time == pytest.approx(2)
    assert found.details == b"d"
    assert (await queue.store.result("t1", "job_a")).body == b"\xffanswer"
    assert (await queue.other.result("t1", "job_a")).headers == b"[]"
    assert await queue.store.claim(LANE, OWNER) is None
    assert [line.split()[1] for line in found.history.splitlines()] == ["queued", "running", "succeeded"]


async def test_somebody_elses_job_is_unknown(queue):
    await submit(queue, "job_a")
    claimed = await claim(queue)
    assert await queue.store.get("t2", "job_a") is None
    assert await queue.store.cancel("t2", "job_a") is None
    assert await queue.store.standing("t2", "job_a") is None
    await queue.store.append_events(claimed.lease, 0, [b"e"])
    assert await queue.store.events_after("t2", "job_a", -1) == []
    await queue.store.finish(claimed.lease, an_answer())
    assert await queue.store.result("t2", "job_a") is None
    assert (await queue.store.list_jobs(JobFilter(tenant="t2"))).jobs == []
    assert (await queue.store.get("", "job_a")).id == "job_a"


async def test_a_finish_repeated_with_the_same_lease_changes_nothing(queue):
    await submit(queue, "job_a")
    claimed = await claim(queue)
    first = await queue.store.finish(claimed.lease, an_answer(b"one"))
    assert await queue.other.finish(claimed.lease, an_answer(b"two")) == first
    assert (await queue.store.result("t1", "job_a")).body == b"one"
    assert len(await queue.store.take_settled(OWNER)) == 1


async def test_a_job_submitted_again_under_its_id_is_the_same(queue):
    await submit(queue, "job_a")
    again = await queue.store.submit(a_job("job_a"), NO_LIMITS)
    assert not again.is_new
    assert (await queue.store.stats()).states == {"queued": 1}


async def test_of_many_that_claim_at_once_each_job_goes_to_one(queue):
    await submit(queue, *(f"job_{n}" for n in range(20)))
    stores = (queue.store, queue.other)
    claims = await asyncio.gather(*(stores[n % 2].claim(LANE, f"o{n}") for n in range(30)))
    ids = [each.job.id for each in claims if each is not None]
    assert sorted(ids) == sorted(f"job_{n}" for n in range(20))


# -- idempotency and caps


async def test_an_idempotency_key_makes_one_job_until_that_is_purged(queue):
    first = await queue.store.submit(a_job("job_a", idempotency=a_key(), keep_s=60), NO_LIMITS)
    again = await queue.other.submit(a_job("job_b", idempotency=a_key()), NO_LIMITS)
    assert (first.is_new, again.is_new, again.job.id) == (True, False, "job_a")
    with pytest.raises(IdempotencyConflictError):
        await queue.store.submit(a_job("job_c", idempotency=a_key(content=b"else")), NO_LIMITS)
    assert await queue.store.get("t1", "job_c") is None
    claimed = await claim(queue)
    await queue.store.finish(claimed.lease, an_answer())
    assert not (await queue.store.submit(a_job("job_d", idempotency=a_key()), NO_LIMITS)).is_new
    queue.clock.forward(61)
    await queue.store.sweep()
    assert (await queue.store.submit(a_job("job_e", idempotency=a_key()), NO_LIMITS)).is_new


async def test_fifty_submits_with_one_key_at_once_make_one_job(queue):
    stores = (queue.store, queue.other)
    made = await asyncio.gather(
        *(stores[n % 2].submit(a_job(f"job_{n}", idempotency=a_key()), NO_LIMITS) for n in range(50))
    )
    assert sum(each.is_new for each in made) == 1
    assert len({each.job.id for each in made}) == 1


async def test_a_tenant_may_not_have_more_waiting_than_its_caps(queue):
    limits = TenantLimits(queued_jobs=2)
    await queue.store.submit(a_job("job_a"), limits)
    await queue.store.submit(a_job("job_b"), limits)
    with pytest.raises(QueueFullError) as refused:
        await queue.store.submit(a_job("job_c"), limits)
    assert (refused.value.depth, refused.value.depth_bytes) == (2, 26)
    await queue.store.submit(a_job("job_d", "t2"), limits)
    await claim(queue)
    await queue.store.submit(a_job("job_c"), limits)  # what runs does not wait
    with pytest.raises(QueueFullError):
        await queue.store.submit(a_job("job_e"), TenantLimits(queued_bytes=30))


# -- leases


async def test_a_lapsed_lease_is_worth_nothing_once_the_job_is_elsewhere(queue):
    await submit(queue, "job_a")
    zombie = await claim(queue)
    queue.clock.forward(LEASE_S + 1)
    assert (await queue.store.sweep()).requeued == 1
    again = await claim(queue, "o2")
    assert again.lease.fence > zombie.lease.fence
    assert await queue.store.renew([zombie.lease]) == {}
    for attempt in (
        queue.other.finish(zombie.lease, an_answer(b"zombie")),
        queue.other.fail(zombie.lease, a_failure()),
        queue.other.append_events(zombie.lease, 0, [b"e"]),
    ):
        with pytest.raises(LeaseLostError):
            await attempt
    assert await queue.other.release([zombie.lease]) == []
    await queue.store.finish(again.lease, an_answer(b"second"))
    with pytest.raises(LeaseLostError):
        await queue.other.finish(zombie.lease, an_answer(b"zombie"))
    assert (await queue.store.result("t1", "job_a")).body == b"second"


async def test_a_lease_is_renewed_and_its_owner_told_of_a_cancel(queue):
    await submit(queue, "job_a", "job_b")
    one, two = await claim(queue), await claim(queue)
    queue.clock.forward(LEASE_S - 1)
    assert await queue.store.renew([one.lease, two.lease]) == {"job_a": "running", "job_b": "running"}
    queue.clock.forward(LEASE_S - 1)
    assert (await queue.store.sweep()).requeued == 0
    assert (await queue.other.cancel("t1", "job_b")).state == "cancelling"
    assert await queue.store.renew([one.lease, two.lease]) == {"job_a": "running", "job_b": "cancelling"}
    ended = await queue.store.finish(two.lease, an_answer(state="cancelled", result=None, cost_nanousd=3))
    assert (ended.state, ended.cost_nanousd) == ("cancelled", 3)


async def test_the_leases_of_a_process_that_died_are_free_at_once(queue):
    await submit(queue, "job_a", "job_b", "job_c")
    dead = await claim(queue, "dead"), await claim(queue, "dead")
    alive = await claim(queue, "alive")
    assert await queue.other.owner_died("dead") == 2
    assert (await queue.store.get("t1", "job_c")).owner == "alive"
    assert await claimed_ids(queue, 3) == ["job_a", "job_b"]
    with pytest.raises(LeaseLostError):
        await queue.store.finish(dead[0].lease, an_answer())
    assert await queue.store.owner_died("dead") == 0
    assert (await queue.store.finish(alive.lease, an_answer())).state == "succeeded"


async def test_a_job_that_kills_its_process_runs_alone_and_then_is_dead(queue):
    await submit(queue, "job_a", webhook="hook", reservation=b"r")
    for owner in ("o1", "o2"):
        await claim(queue, owner)
        await queue.store.owner_died(owner)
    await submit(queue, "job_b", "job_c")
    assert (await queue.store.stats()).lanes[LANE].solitary == 1
    other = await claim(queue, "o3")
    assert other.job.id == "job_b"
    assert await queue.store.claim(LANE, "o3", is_alone=True) is None  # it is not alone
    suspect = await claim(queue, "o4", is_alone=True)
    assert (suspect.job.id, suspect.job.deaths, suspect.is_solitary) == ("job_a", 2, True)
    assert await queue.store.claim(LANE, "o4") is None  # and nothing beside it
    await queue.store.owner_died("o4")
    found = await queue.store.get("t1", "job_a")
    assert (found.state, found.deaths) == ("dead", 3)
    assert "3 processes died" in found.error
    assert found.history.count("its owner died") == 3
    assert [row.subject for row in await queue.store.take_outbox(OWNER)] == ["job_a"]
    (settled,) = await queue.store.take_settled(OWNER)
    assert (settled.job_id, settled.ledger_row, settled.reservation) == ("job_a", b"", b"r")


async def test_a_suspect_that_survives_its_lone_run_ends_as_any_other(queue):
    await submit(queue, "job_a")
    for owner in ("o1", "o2"):
        await claim(queue, owner)
        await queue.store.owner_died(owner)
    suspect = await claim(queue, "o3", is_alone=True)
    assert (await queue.store.finish(suspect.lease, an_answer())).state == "succeeded"
    assert (await queue.store.stats()).lanes == {}


# -- failing


async def test_a_failed_run_is_tried_again_not_before_its_time_and_dead_after_the_last_attempt(queue):
    await submit(queue, "job_a", max_attempts=2)
    claimed = await claim(queue)
    failed = await queue.store.fail(claimed.lease, a_failure(retry_in_s=20, carried=b"waste"))
    assert (failed.state, failed.attempts, failed.error) == ("queued", 1, "engine lost")
    assert failed.not_before_time == pytest.approx(failed.submitted_time + 20)
    assert await queue.store.claim(LANE, OWNER) is None
    assert (await queue.store.stats()).lanes[LANE].delayed == 1
    queue.clock.forward(21)
    again = await claim(queue)
    assert (again.carried, again.job.attempts, again.job.runs) == (b"waste", 1, 2)
    dead = await queue.store.fail(again.lease, a_failure(error="again", ledger_row=b"row"))
    assert (dead.state, dead.attempts, dead.error) == ("dead", 2, "again")
    (settled,) = await queue.store.take_settled(OWNER)
    assert (settled.state, settled.ledger_row) == ("dead", b"row")


async def test_a_lack_of_capacity_is_no_attempt(queue):
    await submit(queue, "job_a", max_attempts=1)
    for _ in range(3):
        claimed = await claim(queue)
        failed = await queue.store.fail(claimed.lease, a_failure(is_counted=False, retry_in_s=0))
        assert (failed.state, failed.attempts) == ("queued", 0)
    claimed = await claim(queue)
    assert await queue.store.release([claimed.lease]) == ["job_a"]
    assert (await queue.store.get("t1", "job_a")).fence == claimed.lease.fence
    assert (await claim(queue)).lease.fence == claimed.lease.fence + 1


async def test_a_retry_that_would_come_too_late_expires_the_job(queue):
    await submit(queue, "job_a", expires_in_s=60)
    claimed = await claim(queue)
    failed = await queue.store.fail(claimed.lease, a_failure(retry_in_s=61))
    assert failed.state == "expired"


async def test_the_requests_own_fault_is_final_with_its_answer(queue):
    await submit(queue, "job_a")
    claimed = await claim(queue)
    ended = await queue.store.finish(claimed.lease, an_answer(b"bad", state="failed", error="status 400"))
    assert (ended.state, ended.error) == ("failed", "status 400")
    assert (await queue.store.result("t1", "job_a")).body == b"bad"


async def test_a_dead_job_is_replayed_as_a_new_one_once(queue):
    await submit(queue, "job_a", max_attempts=1, body=b"again", caller=b"c", webhook="hook")
    claimed = await claim(queue)
    await queue.store.fail(claimed.lease, a_failure())
    again = await queue.store.replay("", "job_a")
    assert (again.state, again.replay_of, again.attempts, again.fence) == ("queued", "job_a", 0, 0)
    assert (await queue.other.replay("t1", "job_a")).id == again.id
    dead = await queue.store.get("t1", "job_a")
    assert (dead.state, dead.replayed_as) == ("dead", again.id)
    claimed = await claim(queue)
    assert (claimed.job.id, claimed.body, claimed.caller) == (again.id, b"again", b"c")
    assert (await queue.store.finish(claimed.lease, an_answer())).state == "succeeded"
    assert await queue.store.replay("", again.id) is None
    assert await queue.store.replay("t2", "job_a") is None


# -- cancelling, expiring, purging


async def test_a_queued_job_is_cancelled_free_of_charge(queue):
    await submit(queue, "job_a", reservation=b"r", webhook="hook")
    assert (await queue.store.cancel("t1", "job_a")).state == "cancelled"
    assert (await queue.store.cancel("t1", "job_a")).state == "cancelled"
    assert await queue.store.claim(LANE, OWNER) is None
    (settled,) = await queue.store.take_settled(OWNER)
    assert (settled.ledger_row, settled.reservation) == (b"", b"r")
    assert len(await queue.store.take_outbox(OWNER)) == 1


async def test_a_finish_that_wins_against_a_cancel_stands(queue):
    await submit(queue, "job_a")
    claimed = await claim(queue)
    await queue.store.cancel("t1", "job_a")
    assert (await queue.store.finish(claimed.lease, an_answer())).state == "succeeded"
    assert (await queue.store.cancel("t1", "job_a")).state == "succeeded"


@pytest.mark.parametrize("ending", ["fail", "release", "owner_died", "sweep"])
async def test_a_cancelled_run_that_ends_in_any_way_is_cancelled(queue, ending):
    await submit(queue, "job_a")
    claimed = await claim(queue)
    await queue.store.cancel("t1", "job_a")
    if ending == "fail":
        await queue.store.fail(claimed.lease, a_failure())
    elif ending == "release":
        await queue.store.release([claimed.lease])
    elif ending == "owner_died":
        await queue.store.owner_died(OWNER)
    else:
        queue.clock.forward(LEASE_S + 1)
        await queue.store.sweep()
    assert (await queue.store.get("t1", "job_a")).state == "cancelled"
    assert (await queue.store.stats()).states == {"cancelled": 1}


async def test_cancels_and_finishes_at_once_end_every_job_once(queue):
    names = [f"job_{n}" for n in range(40)]
    await submit(queue, *names)
    claims = [await claim(queue) for _ in names]
    await asyncio.gather(
        *(queue.other.cancel("t1", name) for name in names),
        *(queue.store.finish(claimed.lease, an_answer()) for claimed in claims),
    )
    for name in names:
        job = await queue.store.get("t1", name)
        states = [line.split()[1] for line in job.history.splitlines()]
        assert sum(state in FINAL for state in states) == 1
    assert len(await queue.store.take_settled(OWNER)) == len(names)


async def test_what_is_past_its_expiry_is_expired_by_a_claim_or_a_sweep(queue):
    await submit(queue, "job_a", "job_b", expires_in_s=60, webhook="hook")
    await submit(queue, "job_c")
    running = await claim(queue)
    queue.clock.forward(61)
    assert (await queue.store.claim(LANE, OWNER)).job.id == "job_c"
    assert (await queue.store.get("t1", "job_b")).state == "expired"
    await queue.store.sweep()
    assert (await queue.store.get("t1", "job_a")).state == "expired"
    with pytest.raises(LeaseLostError):
        await queue.store.finish(running.lease, an_answer())
    assert len(await queue.store.take_outbox(OWNER)) == 2


async def test_a_result_is_purged_after_its_time_and_the_rest_forgotten_later(queue):
    await submit(queue, "job_a", keep_s=100, is_stream=True)
    claimed = await claim(queue)
    await queue.store.append_events(claimed.lease, 0, [b"e"])
    await queue.store.finish(claimed.lease, an_answer())
    queue.clock.forward(99)
    assert (await queue.store.sweep()).purged == 0
    queue.clock.forward(2)
    assert (await queue.store.sweep()).purged == 1
    job = await queue.store.get("t1", "job_a")
    assert (job.is_purged, job.state) == (True, "succeeded")
    assert await queue.store.result("t1", "job_a") is None
    assert await queue.store.events_after("t1", "job_a", -1) == []
    queue.clock.forward(FORGET_S + 1)
    assert (await queue.store.sweep()).forgotten == 1
    assert await queue.store.get("t1", "job_a") is None
    assert (await queue.store.list_jobs(JobFilter(tenant="t1"))).jobs == []
    assert (await queue.store.stats()).states == {}


async def test_a_job_that_has_ended_may_be_purged_at_once(queue):
    await submit(queue, "job_a", is_stream=True, details=b"d")
    assert (await queue.store.purge("t1", "job_a")).state == "queued"
    assert await queue.store.purge("t2", "job_a") is None
    claimed = await claim(queue)
    await queue.store.append_events(claimed.lease, 0, [b"e"])
    await queue.store.finish(claimed.lease, an_answer())
    assert await queue.store.purge("t2", "job_a") is None
    assert (await queue.other.result("t1", "job_a")) is not None
    for _ in range(2):
        job = await queue.store.purge("t1", "job_a")
        assert (job.is_purged, job.state, job.details) == (True, "succeeded", b"")
    assert await queue.other.result("t1", "job_a") is None
    assert await queue.other.events_after("t1", "job_a", -1) == []
    queue.clock.forward(FORGET_S + 1)
    assert (await queue.store.sweep()).forgotten == 1


async def test_a_sweep_does_no_more_than_it_is_asked_and_says_so(queue):
    await submit(queue, *(f"job_{n}" for n in range(5)), expires_in_s=60)
    queue.clock.forward(61)
    first = await queue.store.sweep(most=3)
    assert (first.expired, first.is_all) == (3, False)
    second = await queue.store.sweep(most=3)
    assert (second.expired, second.is_all) == (2, True)
    assert (await queue.store.sweep()).is_all


async def test_a_large_result_is_kept_and_a_larger_one_refused(queue):
    await submit(queue, "job_a")
    claimed = await claim(queue)
    body = b"x" * (LARGEST_BYTES + 1)
    with pytest.raises(ResultTooLargeError):
        await queue.store.finish(claimed.lease, an_answer(body))
    assert (await queue.store.finish(claimed.lease, an_answer(body[1:]))).result_bytes == LARGEST_BYTES
    assert (await queue.other.result("t1", "job_a")).body == body[1:]


# -- streams


async def test_events_are_journaled_in_order_under_the_fence(queue):
    await submit(queue, "job_a", is_stream=True)
    first = await claim(queue)
    await queue.store.append_events(first.lease, 0, [b"a", b"b"])
    with pytest.raises(OutOfOrderError) as refused:
        await queue.store.append_events(first.lease, 1, [b"again"])
    assert refused.value.expected == 2
    await queue.store.release([first.lease])
    with pytest.raises(LeaseLostError):
        await queue.store.append_events(first.lease, 2, [b"late"])
    second = await claim(queue)
    await queue.store.append_events(second.lease, 2, [b"c"])
    events = await queue.other.events_after("t1", "job_a", -1)
    assert [tuple(getattr(e, name) for name in ("index", "fence", "data")) for e in events] == [
        (0, first.lease.fence, b"a"),
        (1, first.lease.fence, b"b"),
        (2, second.lease.fence, b"c"),
    ]
    assert [e.data for e in await queue.other.events_after("t1", "job_a", 0, limit=1)] == [b"b"]


# -- what a job's end owes


async def test_a_settled_row_is_owed_until_it_is_acknowledged_by_who_has_it(queue):
    await submit(queue, "job_a")
    claimed = await claim(queue)
    await queue.store.finish(claimed.lease, an_answer())
    (taken,) = await queue.store.take_settled("o1")
    assert (taken.job_id, taken.state, taken.ledger_row) == ("job_a", "succeeded", b"row")
    assert await queue.other.take_settled("o2") == []
    queue.clock.forward(LEASE_S + 1)
    (again,) = await queue.other.take_settled("o2")
    assert await queue.store.ack_settled([taken]) == []
    assert (await queue.store.stats()).unsettled == 1
    assert await queue.other.ack_settled([again]) == ["job_a"]
    assert await queue.other.ack_settled([again]) == []
    assert (await queue.store.stats()).unsettled == 0


async def test_news_is_delivered_tried_again_and_replayed(queue):
    await submit(queue, "job_a", webhook="hook")
    claimed = await claim(queue)
    await queue.store.finish(claimed.lease, an_answer())
    (news,) = await queue.store.take_outbox("o1")
    assert (news.subject, news.state, news.webhook, news.is_parent) == ("job_a", "succeeded", "hook", False)
    assert await queue.other.take_outbox("o2") == []
    await queue.store.outbox_failed(news, 5.0, "status 500")
    assert await queue.store.take_outbox("o1") == []
    queue.clock.forward(6)
    (again,) = await queue.other.take_outbox("o2")
    assert (again.id, again.attempts) == (news.id, 1)
    await queue.store.outbox_failed(news, None, "late")  # another has it now
    await queue.other.outbox_delivered(again)
    (listed,) = await queue.store.list_outbox("job_a")
    assert (listed.attempts, listed.next_time, listed.error) == (1, None, "")
    assert listed.delivered_time is not None
    assert await queue.store.outbox_replay(news.id)
    assert not await queue.store.outbox_replay("msg_unknown")
    (third,) = await queue.store.take_outbox("o1")
    await queue.store.outbox_failed(third, None, "status 410")
    stats = await queue.store.stats()
    assert (stats.outbox_due, stats.outbox_waiting, stats.outbox_dead) == (0, 0, 1)


async def test_what_a_dead_process_had_taken_is_owed_at_once(queue):
    await submit(queue, "job_a", webhook="hook")
    claimed = await claim(queue)
    await queue.store.finish(claimed.lease, an_answer())
    (settled,), (news,) = await queue.store.take_settled("dead"), await queue.store.take_outbox("dead")
    await queue.store.owner_died("dead")
    assert [row.job_id for row in await queue.store.take_settled("o2")] == [settled.job_id]
    assert [row.id for row in await queue.store.take_outbox("o2")] == [news.id]


# -- reading


async def test_jobs_are_listed_newest_first_by_page(queue):
    for n in range(5):
        await submit(queue, f"job_{n}", door="response" if n % 2 else "job")
    await submit(queue, "job_x", tenant="t2")
    page = await queue.store.list_jobs(JobFilter(tenant="t1"), limit=2)
    assert [job.id for job in page.jobs] == ["job_4", "job_3"]
    page = await queue.other.list_jobs(JobFilter(tenant="t1"), page.cursor, limit=10)
    assert ([job.id for job in page.jobs], page.cursor) == (["job_2", "job_1", "job_0"], None)
    responses = await queue.store.list_jobs(JobFilter(tenant="t1", doors=("response",)))
    assert [job.id for job in responses.jobs] == ["job_3", "job_1"]
    await queue.store.cancel("t1", "job_2")
    cancelled = await queue.store.list_jobs(JobFilter(states=("cancelled",)))
    assert [job.id for job in cancelled.jobs] == ["job_2"]
    assert len((await queue.store.list_jobs(JobFilter(), "no cursor of ours")).jobs) == 6


async def test_jobs_that_somebody_has_are_listed_newest_first_by_page(queue):
    for number in range(6):
        await queue.store.submit(a_job(f"job_{number}", tenant=f"t{number % 2}"), NO_LIMITS)
    leases = {}
    for _ in range(5):
        claimed = await queue.store.claim(LANE, "o")
        leases[claimed.job.id] = claimed.lease
    for job_id in ("job_1", "job_2", "job_3"):
        await queue.other.cancel("", job_id)
    await queue.store.finish(leases["job_3"], an_answer())
    cancelling = await queue.store.list_jobs(JobFilter(states=("cancelling",)))
    assert [job.id for job in cancelling.jobs] == ["job_2", "job_1"]
    running = JobFilter(states=("running", "cancelling"))
    leased = sorted(leases.keys() - {"job_3"}, reverse=True)
    page = await queue.store.list_jobs(running, limit=2)
    assert [job.id for job in page.jobs] == leased[:2]
    page = await queue.store.list_jobs(running, page.cursor, limit=2)
    assert ([job.id for job in page.jobs], page.cursor) == (leased[2:], None)
    own = await queue.store.list_jobs(JobFilter(tenant="t1", states=("running", "cancelling")))
    assert {job.tenant for job in own.jobs} == {"t1"}


async def test_stats_and_standings_say_how_long_the_queue_is(queue):
    await submit(queue, "job_a", "job_b", "job_c")
    await submit(queue, "job_d", job_class="batch")
    await submit(queue, "job_x", tenant="t2")
    assert (await queue.store.standing("t1", "job_a")).ahead == 1
    assert (await queue.store.standing("t1", "job_d")).ahead == 4
    assert (await queue.store.standing("t2", "job_x")).ahead == 1
    claimed = await claim(queue)
    lane = (await queue.store.stats()).lanes[LANE]
    assert (lane.queued, lane.queued_flex, lane.queued_batch, lane.running, lane.tenants) == (4, 3, 1, 1, 2)
    assert lane.oldest_queued_time == pytest.approx(queue.clock.time_s)
    standing = await queue.store.standing("t1", claimed.job.id)
    assert (standing.state, standing.ahead) == ("running", 0)
    await queue.store.finish(claimed.lease, an_answer())
    assert (await queue.store.standing("t1", "job_b")).lane.finished_per_s > 0
    assert (await queue.store.stats()).states == {"queued": 4, "succeeded": 1}
