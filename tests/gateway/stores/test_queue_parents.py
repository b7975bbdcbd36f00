"""Parents in both stores: taken in by pieces, released, counted, cancelled, finished."""

import pytest

from gateway.overflow.job import LEASE_S, JobFilter, TenantLimits
from gateway.overflow.store import (
    FORGET_S,
    IdempotencyConflictError,
    LeaseLostError,
    OutOfOrderError,
    QueueFullError,
)
from tests.support.queue_jobs import LANE, NO_LIMITS, a_failure, a_job, a_key, a_parent, an_answer

OWNER = "node/worker/1"


def children(first, count, **others):
    return [a_job(f"job_{n}", reference=f"line-{n}", **others) for n in range(first, first + count)]


async def opened_parent(queue, count=3, **others):
    parent, lease = await queue.store.open_parent(a_parent("batch_a", **others), OWNER)
    assert (parent.state, parent.total) == ("validating", 0)
    await queue.store.append_children(lease, 0, children(0, count), NO_LIMITS)
    return lease


async def run_one(queue, **others):
    claimed = await queue.store.claim(LANE, OWNER)
    return await queue.store.finish(claimed.lease, an_answer(**others))


async def test_a_parent_is_filled_in_pieces_released_in_pieces_and_finalized_by_its_door(queue):
    lease = await opened_parent(queue, webhook="hook", details=b"validating")
    with pytest.raises(OutOfOrderError) as refused:
        await queue.store.append_children(lease, 0, children(0, 3), NO_LIMITS)
    assert refused.value.expected == 3
    parent = await queue.store.append_children(lease, 3, children(3, 2), NO_LIMITS)
    assert (parent.total, parent.counts) == (5, {"staged": 5})
    assert await queue.other.claim(LANE, OWNER) is None
    assert await queue.store.release_parent(lease, most=3) == 2
    assert (await queue.other.get_parent("t1", "batch_a")).counts == {"staged": 2, "queued": 3}
    assert await queue.store.release_parent(lease) == 0
    assert (await queue.store.get_parent("t1", "batch_a")).state == "in_progress"
    for n in range(5):
        job = await run_one(queue, state="failed" if n == 4 else "succeeded")
        assert (job.id, job.parent, job.position, job.reference) == (f"job_{n}", "batch_a", n, f"line-{n}")
    parent = await queue.other.get_parent("t1", "batch_a")
    assert (parent.state, parent.counts) == ("finalizing", {"succeeded": 4, "failed": 1})
    assert parent.settled_time is not None
    assert await queue.store.take_outbox(OWNER) == []
    found, lease = await queue.other.claim_parent("o2", "batch")
    assert (found.id, found.state) == ("batch_a", "finalizing")
    assert await queue.store.claim_parent("o3", "batch") is None
    ended = await queue.other.finish_parent(lease, "completed", b"done")
    assert (ended.state, ended.details) == ("completed", b"done")
    assert await queue.other.finish_parent(lease, "completed", b"again") == ended
    (news,) = await queue.store.take_outbox(OWNER)
    assert (news.subject, news.state, news.is_parent) == ("batch_a", "completed", True)


async def test_children_are_listed_by_position(queue):
    lease = await opened_parent(queue, count=5)
    await queue.store.release_parent(lease)
    page = await queue.store.list_jobs(JobFilter(tenant="t1", parent="batch_a"), limit=2)
    assert [job.position for job in page.jobs] == [0, 1]
    page = await queue.store.list_jobs(JobFilter(tenant="t1", parent="batch_a"), page.cursor, limit=5)
    assert ([job.position for job in page.jobs], page.cursor) == ([2, 3, 4], None)
    assert (await queue.store.list_jobs(JobFilter(tenant="t2", parent="batch_a"))).jobs == []


async def test_who_takes_over_from_a_dead_owner_goes_on_where_that_one_was(queue):
    lost = await opened_parent(queue)
    assert await queue.other.claim_parent("o2", "batch") is None
    queue.clock.forward(LEASE_S - 1)
    await queue.store.renew_parent(lost)
    queue.clock.forward(LEASE_S - 1)
    assert await queue.other.claim_parent("o2", "batch") is None
    await queue.other.owner_died(OWNER)
    found, lease = await queue.other.claim_parent("o2", "batch")
    assert (found.state, found.total) == ("validating", 3)
    for attempt in (
        queue.store.append_children(lost, 3, children(3, 1), NO_LIMITS),
        queue.store.release_parent(lost),
        queue.store.renew_parent(lost),
        queue.store.fail_parent(lost, b""),
    ):
        with pytest.raises(LeaseLostError):
            await attempt
    await queue.other.append_children(lease, found.total, children(3, 1), NO_LIMITS)
    assert await queue.other.release_parent(lease) == 0
    assert (await queue.store.get_parent("t1", "batch_a")).counts == {"queued": 4}


async def test_jobs_handed_in_as_one_end_their_parent_without_a_door(queue):
    new = a_parent("batch_a", is_finalized=False, door="workers_ai", webhook="hook")
    parent, is_new = await queue.store.submit_all(new, children(0, 2), NO_LIMITS)
    assert is_new
    assert (parent.state, parent.total, parent.counts) == ("in_progress", 2, {"queued": 2})
    await run_one(queue)
    assert (await queue.store.get_parent("t1", "batch_a")).state == "in_progress"
    await run_one(queue)
    assert (await queue.store.get_parent("t1", "batch_a")).state == "completed"
    assert [(n.subject, n.state) for n in await queue.store.take_outbox(OWNER)] == [("batch_a", "completed")]
    assert await queue.store.claim_parent(OWNER, "workers_ai") is None


async def test_an_idempotency_key_makes_one_parent(queue):
    new = a_parent("batch_a", idempotency=a_key())
    await queue.store.submit_all(new, children(0, 2), NO_LIMITS)
    again, is_new = await queue.other.submit_all(
        a_parent("batch_b", idempotency=a_key()), children(2, 2), NO_LIMITS
    )
    assert (again.id, is_new) == ("batch_a", False)
    found, lease = await queue.other.open_parent(a_parent("batch_c", idempotency=a_key()), OWNER)
    assert (found.id, lease) == ("batch_a", None)
    with pytest.raises(IdempotencyConflictError):
        await queue.store.open_parent(a_parent("batch_d", idempotency=a_key(content=b"else")), OWNER)
    assert (await queue.store.stats()).states == {"queued": 2}


async def test_children_count_towards_the_caps_and_none_is_appended_beyond_them(queue):
    limits = TenantLimits(queued_jobs=4)
    lease = await opened_parent(queue)
    with pytest.raises(QueueFullError):
        await queue.store.append_children(lease, 3, children(3, 2), limits)
    with pytest.raises(QueueFullError):
        await queue.store.submit_all(a_parent("batch_b"), children(3, 2), limits)
    assert await queue.store.get_parent("t1", "batch_b") is None
    assert (await queue.store.get_parent("t1", "batch_a")).total == 3
    await queue.store.append_children(lease, 3, children(3, 1), limits)


async def test_a_cancelled_parent_keeps_what_has_ended_and_starts_nothing_more(queue):
    lease = await opened_parent(queue, count=300)
    await queue.store.release_parent(lease)
    await run_one(queue)
    running = await queue.store.claim(LANE, OWNER)
    parent = await queue.other.cancel_parent("t1", "batch_a")
    assert (parent.state, parent.counts["succeeded"], parent.counts["cancelling"]) == ("cancelling", 1, 1)
    assert await queue.store.claim(LANE, OWNER) is None
    while not (await queue.store.sweep(most=50)).is_all:
        pass
    assert await queue.store.renew([running.lease]) == {running.job.id: "cancelling"}
    await queue.store.finish(running.lease, an_answer(state="cancelled", result=None))
    parent = await queue.store.get_parent("t1", "batch_a")
    assert (parent.state, parent.counts) == ("finalizing", {"succeeded": 1, "cancelled": 299})
    assert parent.cancelled_time is not None
    assert (await queue.store.cancel_parent("t1", "batch_a")).state == "finalizing"
    assert await queue.store.cancel_parent("t2", "batch_a") is None


async def test_a_parent_that_is_cancelled_while_it_is_taken_in_takes_no_more(queue):
    lease = await opened_parent(queue)
    await queue.other.cancel_parent("t1", "batch_a")
    with pytest.raises(LeaseLostError):
        await queue.store.append_children(lease, 3, children(3, 1), NO_LIMITS)
    with pytest.raises(LeaseLostError):
        await queue.store.release_parent(lease)
    assert (await queue.store.get_parent("t1", "batch_a")).state == "finalizing"


async def test_a_parent_whose_content_is_refused_fails_and_its_children_never_run(queue):
    lease = await opened_parent(queue, webhook="hook")
    failed = await queue.store.fail_parent(lease, b"line 4 is no JSON")
    assert (failed.state, failed.details) == ("failed", b"line 4 is no JSON")
    assert await queue.store.fail_parent(lease, b"again") == failed
    await queue.store.sweep()
    assert (await queue.store.get_parent("t1", "batch_a")).counts == {"cancelled": 3}
    assert [news.state for news in await queue.store.take_outbox(OWNER)] == ["failed"]


async def test_children_expire_with_their_parent(queue):
    lease = await opened_parent(queue, expires_in_s=60)
    await queue.store.release_parent(lease)
    await run_one(queue)
    queue.clock.forward(61)
    while not (await queue.store.sweep()).is_all:
        pass
    parent = await queue.store.get_parent("t1", "batch_a")
    assert (parent.state, parent.counts) == ("finalizing", {"succeeded": 1, "expired": 2})


async def test_a_parent_that_is_never_released_expires(queue):
    await opened_parent(queue, expires_in_s=60, webhook="hook")
    queue.clock.forward(61)
    while not (await queue.store.sweep()).is_all:
        pass
    parent = await queue.store.get_parent("t1", "batch_a")
    assert (parent.state, parent.counts) == ("expired", {"expired": 3})
    assert len(await queue.store.take_outbox(OWNER)) == 1


async def test_a_parent_without_children_is_finalized_at_once(queue):
    _, lease = await queue.store.open_parent(a_parent("batch_a"), OWNER)
    assert await queue.store.release_parent(lease) == 0
    assert (await queue.store.get_parent("t1", "batch_a")).state == "finalizing"
    parent, _ = await queue.store.submit_all(a_parent("batch_b", is_finalized=False), [], NO_LIMITS)
    assert parent.state == "completed"


async def test_a_child_that_is_tried_again_or_dies_is_counted_where_it_is(queue):
    await queue.store.submit_all(
        a_parent("batch_a", is_finalized=False), children(0, 1, max_attempts=2), NO_LIMITS
    )
    claimed = await queue.store.claim(LANE, OWNER)
    await queue.store.fail(claimed.lease, a_failure(retry_in_s=0))
    assert (await queue.store.get_parent("t1", "batch_a")).counts == {"queued": 1}
    claimed = await queue.store.claim(LANE, OWNER)
    assert (await queue.store.get_parent("t1", "batch_a")).counts == {"running": 1}
    await queue.store.fail(claimed.lease, a_failure())
    parent = await queue.store.get_parent("t1", "batch_a")
    assert (parent.state, parent.counts) == ("completed", {"dead": 1})


async def test_parents_are_listed_newest_first_and_forgotten_in_the_end(queue):
    for name in ("batch_a", "batch_b", "batch_c"):
        await queue.store.submit_all(a_parent(name, is_finalized=False), [], NO_LIMITS)
        queue.clock.forward(1)
    found, has_more = await queue.store.list_parents("t1", "batch", limit=2)
    assert ([parent.id for parent in found], has_more) == (["batch_c", "batch_b"], True)
    found, has_more = await queue.store.list_parents("t1", "batch", after="batch_b", limit=2)
    assert ([parent.id for parent in found], has_more) == (["batch_a"], False)
    assert await queue.store.list_parents("t2", "batch") == ([], False)
    assert await queue.store.get_parent("t2", "batch_a") is None
    queue.clock.forward(86_400)
    await queue.store.sweep()
    queue.clock.forward(FORGET_S + 1)
    await queue.store.sweep()
    assert await queue.store.list_parents("t1", "batch") == ([], False)


async def test_who_is_to_hear_that_a_parent_was_handed_in_is_told_once_and_again_how_it_ended(queue):
    asked = {"door": "workers_ai", "is_finalized": False, "webhook": "we_a https://b", "announces": "we_a"}
    for _ in range(2):
        parent = a_parent("request_a", idempotency=a_key(), **asked)
        await queue.store.submit_all(parent, [a_job("job_a")], NO_LIMITS)
    (news,) = await queue.other.take_outbox(OWNER)
    assert (news.subject, news.state, news.webhook, news.is_parent) == ("request_a", "queued", "we_a", True)
    await run_one(queue)
    told = [(news.webhook, news.state) for news in await queue.store.take_outbox(OWNER)]
    assert sorted(told) == [("https://b", "completed"), ("we_a", "completed")]
