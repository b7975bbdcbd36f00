"""Whose turn it is, in both stores: between tenants, between classes, and as time goes by."""

from collections import Counter

import pytest

from gateway.overflow.job import AGEING_S, TenantLimits
from tests.support.queue_jobs import LANE, NO_LIMITS, a_failure, a_job, an_answer


async def submit(queue, tenant, count, limits=NO_LIMITS, **others):
    for n in range(count):
        await queue.store.submit(
            a_job(f"job_{tenant}-{others.get('job_class', '')}-{n}", tenant, **others), limits
        )


async def served(queue, count, slots=4, units=None, seconds=0.0):
    """The tenants of the next claims, with so many running at a time; each is finished in its turn."""
    running, order = [], []
    for _ in range(count):
        claimed = await queue.store.claim(LANE, "o")
        if claimed is None:
            break
        order.append(claimed.job)
        running.append(claimed)
        queue.clock.forward(seconds)
        if len(running) == slots:
            first = running.pop(0)
            spent = None if units is None else units[first.job.tenant]
            await queue.store.finish(first.lease, an_answer(units=spent))
    for claimed in running:
        await queue.store.finish(claimed.lease, an_answer())
    return order


async def test_a_tenant_that_comes_late_is_not_behind_the_backlog_of_another(queue):
    await submit(queue, "a", 60)
    await served(queue, 20)
    await submit(queue, "b", 10)
    order = [job.tenant for job in await served(queue, 22)]
    assert order.count("b") == 10


async def test_equal_tenants_get_equal_shares(queue):
    for tenant in "abcd":
        await submit(queue, tenant, 25)
    share = Counter(job.tenant for job in await served(queue, 40))
    assert max(share.values()) - min(share.values()) <= 1


async def test_shares_are_of_cost_not_of_jobs(queue):
    await submit(queue, "a", 60, estimate=10)
    await submit(queue, "b", 60, estimate=100)
    order = await served(queue, 66, slots=1)
    cost = Counter()
    for job in order:
        cost[job.tenant] += job.estimate
    assert cost["a"] == pytest.approx(cost["b"], rel=0.2)


async def test_what_a_job_really_cost_counts_once_it_has_ended(queue):
    await submit(queue, "a", 40)
    await submit(queue, "b", 40)
    share = Counter(job.tenant for job in await served(queue, 44, slots=1, units={"a": 10, "b": 1}))
    assert share["b"] >= 3 * share["a"]


async def test_a_weight_is_a_larger_share(queue):
    await submit(queue, "a", 40, TenantLimits(weight=3.0))
    await submit(queue, "b", 40)
    share = Counter(job.tenant for job in await served(queue, 40, slots=1))
    assert share["a"] == pytest.approx(30, abs=2)


async def test_nothing_is_saved_up_by_being_idle(queue):
    await submit(queue, "a", 80)
    await submit(queue, "b", 1)
    await served(queue, 40)
    await submit(queue, "b", 40)
    share = Counter(job.tenant for job in await served(queue, 20, slots=1))
    assert share["a"] == pytest.approx(10, abs=1)


async def test_who_has_half_of_what_runs_waits_for_the_others(queue):
    await submit(queue, "a", 10)
    for _ in range(6):
        await queue.store.claim(LANE, "o")
    await submit(queue, "b", 10, estimate=1000)
    claims = [(await queue.store.claim(LANE, "o")).job.tenant for _ in range(6)]
    assert claims == ["b"] * 6
    # Alone, a tenant may have everything.
    assert [(await queue.store.claim(LANE, "o")).job.tenant for _ in range(8)].count("a") == 4


async def test_a_failed_run_costs_what_it_used_and_no_more(queue):
    await submit(queue, "a", 20, estimate=100)
    await submit(queue, "b", 20, estimate=100)
    for _ in range(10):
        claimed = await queue.store.claim(LANE, "o")
        await queue.store.fail(claimed.lease, a_failure(retry_in_s=3600, is_counted=False))
    share = Counter(job.tenant for job in await served(queue, 20, slots=1))
    assert abs(share["a"] - share["b"]) <= 2


async def test_flex_goes_before_batch_within_a_tenant_until_batch_has_aged(queue):
    await submit(queue, "a", 2, job_class="batch")
    queue.clock.forward(1)
    await submit(queue, "a", 2, job_class="flex")
    order = [job.job_class for job in await served(queue, 1)]
    assert order == ["flex"]
    queue.clock.forward(AGEING_S)
    order = [job.job_class for job in await served(queue, 3)]
    assert order == ["batch", "batch", "flex"]


async def test_batch_gets_one_turn_in_twenty_whoever_floods_the_lane(queue):
    await submit(queue, "b", 5, job_class="batch")
    await submit(queue, "a", 100, job_class="flex")
    await submit(queue, "b", 60, job_class="flex")
    order = [job.job_class for job in await served(queue, 100)]
    assert order.count("batch") == 5
    assert order.index("batch") < 20


async def test_no_batch_job_waits_for_ever_behind_flex(queue):
    """Q7, 30 minutes in which flex saturates the lane."""
    await submit(queue, "a", 9, job_class="batch")
    waits = []
    for minute in range(60):
        for n in range(4):
            await queue.store.submit(a_job(f"job_f-{minute}-{n}", "a", job_class="flex"), NO_LIMITS)
        waits.extend(
            queue.clock.time_s - job.submitted_time
            for job in await served(queue, 3, slots=1, seconds=10.0)
            if job.job_class == "batch"
        )
    assert len(waits) == 9
    assert max(waits) <= 3600


async def test_a_lane_does_not_wait_for_another(queue):
    await submit(queue, "a", 5)
    await queue.store.submit(a_job("job_x", "a", lane="other"), NO_LIMITS)
    assert (await queue.store.claim("other", "o")).job.id == "job_x"
    assert await queue.store.claim("other", "o") is None
    assert set((await queue.store.stats()).lanes) == {LANE, "other"}


async def test_a_retried_job_keeps_its_place(queue):
    await submit(queue, "a", 3)
    claimed = await queue.store.claim(LANE, "o")
    await queue.store.fail(claimed.lease, a_failure(retry_in_s=5))
    assert (await queue.store.claim(LANE, "o")).job.id == "job_a--1"
    queue.clock.forward(6)
    assert (await queue.store.claim(LANE, "o")).job.id == "job_a--0"
