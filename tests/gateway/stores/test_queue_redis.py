"""What only the queue in Redis does: after a flush, a restart or an absence the nodes tell it again what was promised."""

import pytest

from gateway.overflow.job import JobFilter
from gateway.overflow.store import LeaseLostError, StoreAwayError
from tests.support.queue_clock import QueueClock
from tests.support.queue_jobs import LANE, NO_LIMITS, a_failure, a_job, a_key, a_parent, an_answer
from tests.support.queue_stores import redis_queue
from tests.support.redis_server import RedisServer

OWNER = "node/worker/1"
GRACE_S = 5.0


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


class Nodes:
    """Two nodes: their disks are their own, their Redis is one."""

    def __init__(self, server, directory):
        self.server, self.directory, self.clock = server, directory, QueueClock()
        self.one = self.started("one")
        self.two = self.started("two")

    def started(self, name):
        return redis_queue(self.server, self.directory / name, self.clock, grace_s=GRACE_S)

    async def opened(self):
        """Nothing is claimed in the first seconds of an epoch."""
        for node in (self.one, self.two):
            await node.sweep()
        self.clock.forward(GRACE_S + 1)
        return self

    async def flushed(self):
        """Redis lost everything, and both nodes have noticed."""
        self.server.command("FLUSHALL")
        return await self.opened()

    async def close(self):
        await self.one.close()
        await self.two.close()


@pytest.fixture
async def nodes(server, tmp_path):
    server.command("FLUSHALL")
    nodes = await Nodes(server, tmp_path).opened()
    yield nodes
    await nodes.close()


async def test_a_job_that_was_accepted_is_there_after_a_flush_under_its_id(nodes):
    new = a_job(
        "job_a", body=b"\x00b", headers=b"h", caller=b"c", reservation=b"r", details=b"d", webhook="w1 w2"
    )
    before = (await nodes.one.submit(new, NO_LIMITS)).job
    nodes.clock.forward(10)
    await nodes.flushed()
    found = await nodes.two.get("t1", "job_a")
    assert (found.state, found.submitted_time, found.expires_time) == (
        "queued",
        pytest.approx(before.submitted_time),
        pytest.approx(before.expires_time),
    )
    claimed = await nodes.two.claim(LANE, OWNER)
    assert (claimed.body, claimed.headers, claimed.caller) == (b"\x00b", b"h", b"c")
    assert (claimed.reservation, claimed.job.details) == (b"r", b"d")
    await nodes.two.finish(claimed.lease, an_answer())
    assert sorted(news.webhook for news in await nodes.one.take_outbox(OWNER)) == ["w1", "w2"]


async def test_an_end_is_the_same_after_a_flush_and_is_billed_under_one_id(nodes):
    await nodes.one.submit(a_job("job_a", idempotency=a_key(), webhook="hook"), NO_LIMITS)
    claimed = await nodes.two.claim(LANE, OWNER)
    await nodes.two.finish(claimed.lease, an_answer(b"answer", usage=b"u"))
    (news,) = await nodes.one.take_outbox(OWNER)
    await nodes.flushed()
    found = await nodes.one.get("t1", "job_a")
    assert (found.state, found.cost_nanousd, found.usage, found.status) == ("succeeded", 7, b"u", 200)
    assert (await nodes.one.result("t1", "job_a")).body == b"answer"
    assert await nodes.one.claim(LANE, OWNER) is None
    (settled,) = await nodes.one.take_settled(OWNER)
    assert (settled.job_id, settled.ledger_row) == ("job_a", b"row")
    assert [each.id for each in await nodes.one.take_outbox(OWNER)] == [news.id]
    again = await nodes.one.submit(a_job("job_b", idempotency=a_key()), NO_LIMITS)
    assert (again.is_new, again.job.id) == (False, "job_a")
    assert (await nodes.one.stats()).states == {"succeeded": 1}


async def test_a_run_that_was_under_way_may_end_its_job_when_nobody_else_has_it(nodes):
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    claimed = await nodes.two.claim(LANE, OWNER)
    nodes.server.command("FLUSHALL")
    ended = await nodes.two.finish(claimed.lease, an_answer(b"kept"))
    assert ended.state == "succeeded"
    await nodes.opened()
    assert (await nodes.one.result("t1", "job_a")).body == b"kept"
    assert await nodes.one.claim(LANE, OWNER) is None


async def test_a_run_from_before_a_flush_is_a_zombie_once_another_has_its_job(nodes):
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    zombie = await nodes.two.claim(LANE, OWNER)
    await nodes.flushed()
    claimed = await nodes.one.claim(LANE, "o2")
    assert claimed.lease.fence > zombie.lease.fence
    with pytest.raises(LeaseLostError):
        await nodes.two.finish(zombie.lease, an_answer(b"zombie"))
    await nodes.one.finish(claimed.lease, an_answer(b"second"))
    await nodes.flushed()
    assert (await nodes.two.result("t1", "job_a")).body == b"second"


async def test_an_intent_whose_process_died_is_carried_out_by_the_next_one(nodes):
    """Killed between its journal and Redis: the answer was there, and is paid for once."""
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    claimed = await nodes.two.claim(LANE, OWNER)

    async def dies(*_, **__):
        raise StoreAwayError("killed")

    ask, nodes.two._node.ask = nodes.two._node.ask, dies
    with pytest.raises(StoreAwayError):
        await nodes.two.finish(claimed.lease, an_answer(b"kept"))
    nodes.two._node.ask = ask
    await nodes.flushed()
    assert (await nodes.one.result("t1", "job_a")).body == b"kept"
    assert len(await nodes.one.take_settled(OWNER)) == 1


async def test_what_was_cancelled_stays_cancelled_and_what_is_too_late_expires(nodes):
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    await nodes.one.submit(a_job("job_b", expires_in_s=60), NO_LIMITS)
    await nodes.two.cancel("t1", "job_a")
    nodes.clock.forward(61)
    await nodes.flushed()
    assert await nodes.one.claim(LANE, OWNER) is None
    assert (await nodes.one.get("t1", "job_a")).state == "cancelled"
    assert (await nodes.one.get("t1", "job_b")).state == "expired"


async def test_what_a_sweep_ended_stays_so(nodes):
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    await nodes.one.submit(a_job("job_b", expires_in_s=60), NO_LIMITS)
    for owner in ("o1", "o2", "o3"):
        await nodes.two.claim(LANE, owner, is_alone=owner == "o3")
        await nodes.two.owner_died(owner)
    nodes.clock.forward(61)
    await nodes.two.sweep()
    await nodes.one.sweep()  # which finds that what it promised has ended
    await nodes.flushed()
    assert (await nodes.one.get("t1", "job_a")).state == "dead"
    assert (await nodes.one.get("t1", "job_b")).state == "expired"


async def test_a_parent_and_its_children_are_there_after_a_flush(nodes):
    _, lease = await nodes.one.open_parent(a_parent("batch_a", details=b"d", webhook="hook"), OWNER)
    children = [a_job(f"job_{n}", reference=f"line-{n}") for n in range(4)]
    await nodes.one.append_children(lease, 0, children[:3], NO_LIMITS)
    await nodes.one.append_children(lease, 3, children[3:], NO_LIMITS)
    assert await nodes.one.release_parent(lease) == 0
    claimed = await nodes.two.claim(LANE, OWNER)
    await nodes.two.finish(claimed.lease, an_answer())
    await nodes.flushed()
    parent = await nodes.two.get_parent("t1", "batch_a")
    assert (parent.state, parent.total, parent.counts) == ("in_progress", 4, {"succeeded": 1, "queued": 3})
    page = await nodes.two.list_jobs(JobFilter(tenant="t1", parent="batch_a"))
    assert [job.reference for job in page.jobs] == [f"line-{n}" for n in range(4)]
    while (claimed := await nodes.two.claim(LANE, OWNER)) is not None:
        await nodes.two.finish(claimed.lease, an_answer())
    _, lease = await nodes.two.claim_parent(OWNER, "batch")
    await nodes.two.finish_parent(lease, "completed", b"done")
    await nodes.flushed()
    parent = await nodes.one.get_parent("t1", "batch_a")
    assert (parent.state, parent.details, parent.counts) == ("completed", b"done", {"succeeded": 4})


async def test_a_parent_that_was_being_taken_in_goes_on_where_it_was(nodes):
    _, lease = await nodes.one.open_parent(a_parent("batch_a"), OWNER)
    await nodes.one.append_children(lease, 0, [a_job("job_0"), a_job("job_1")], NO_LIMITS)
    await nodes.flushed()
    found, lease = await nodes.two.claim_parent(OWNER, "batch")
    assert (found.state, found.total, found.counts) == ("validating", 2, {"staged": 2})
    await nodes.two.append_children(lease, 2, [a_job("job_2")], NO_LIMITS)
    assert await nodes.two.release_parent(lease) == 0
    await nodes.two.cancel_parent("t1", "batch_a")
    await nodes.flushed()
    parent = await nodes.one.get_parent("t1", "batch_a")
    assert (parent.state, parent.counts) == ("finalizing", {"cancelled": 3})


async def test_a_restart_without_what_was_written_last_is_noticed(nodes):
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    await nodes.one.submit(a_job("job_b"), NO_LIMITS)
    claimed = await nodes.one.claim(LANE, OWNER)
    await nodes.one.finish(claimed.lease, an_answer())
    nodes.server.kill()
    with pytest.raises(StoreAwayError):
        await nodes.one.submit(a_job("job_c"), NO_LIMITS)
    nodes.server.start()
    await nodes.opened()
    assert (await nodes.two.stats()).states == {"queued": 1, "succeeded": 1}
    assert (await nodes.two.claim(LANE, OWNER)).job.id == "job_b"


async def test_a_failover_to_a_server_that_has_most_of_it_begins_another_epoch(nodes):
    """Its epoch is the same, its name is not: what the old one acknowledged last may be missing."""
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    zombie = await nodes.one.claim(LANE, OWNER)
    nodes.server.command("HSET", "{t}:queue:meta", "run_id", "another")
    await nodes.opened()
    assert (await nodes.one.renew([zombie.lease])) == {"job_a": "running"}
    await nodes.one.fail(zombie.lease, a_failure(retry_in_s=0))
    assert (await nodes.two.claim(LANE, "o2")).lease.fence > zombie.lease.fence + 1


async def test_nothing_is_claimed_before_the_nodes_have_told_what_ended(nodes):
    await nodes.one.submit(a_job("job_a"), NO_LIMITS)
    nodes.server.command("FLUSHALL")
    assert await nodes.one.claim(LANE, OWNER) is None
    assert (await nodes.one.get("t1", "job_a")).state == "queued"
    nodes.clock.forward(GRACE_S + 1)
    assert (await nodes.one.claim(LANE, OWNER)).job.id == "job_a"


async def test_a_node_forgets_promises_that_were_kept_and_ends_that_were_purged(nodes):
    for name in ("job_a", "job_b"):
        await nodes.one.submit(a_job(name, body=b"secret-in-the-body"), NO_LIMITS)
    claimed = await nodes.two.claim(LANE, OWNER)
    await nodes.two.finish(claimed.lease, an_answer(b"secret-in-the-answer"))
    await nodes.one.sweep()
    journal = nodes.one._node.journal
    assert await journal.promised("", 10) == ["job_b"]
    await nodes.one.purge("t1", "job_a")
    await nodes.two.sweep()
    assert await nodes.two._node.journal.ends_after("", 10) == []
    await nodes.one.cancel("t1", "job_b")
    await nodes.one.purge("t1", "job_b")
    for name in ("one", "two"):
        for path in (nodes.directory / name).iterdir():
            assert b"secret-in" not in path.read_bytes()


async def test_a_node_forgets_all_promises_that_others_have_kept_since_its_last_turn(nodes, monkeypatch):
    monkeypatch.setattr("gateway.stores.queue_node._AT_ONCE", 10)
    jobs = [a_job() for _ in range(35)]
    await nodes.one.submit_all(a_parent(is_finalized=False), jobs, NO_LIMITS)
    for _ in jobs:
        await nodes.two.finish((await nodes.two.claim(LANE, OWNER)).lease, an_answer())
    await nodes.one.sweep()
    assert await nodes.one._node.journal.promised("", 100) == []


async def test_a_process_remembers_nothing_of_runs_it_gave_back_or_lost(nodes):
    for _ in range(3):
        await nodes.one.submit(a_job(), NO_LIMITS)
    released, lost, kept = [(await nodes.one.claim(LANE, OWNER)).lease for _ in range(3)]
    await nodes.one.release([released])
    assert nodes.one._leased.keys() == {lost.job_id, kept.job_id}
    nodes.clock.forward(20)
    await nodes.two.renew([kept])
    nodes.clock.forward(20)
    await nodes.two.sweep()
    await nodes.one.renew([lost, kept])
    assert nodes.one._leased.keys() == {kept.job_id}


async def test_what_workers_ask_every_second_costs_what_runs_and_not_what_is_kept(nodes):
    jobs = [a_job() for _ in range(200)]
    await nodes.one.submit_all(a_parent(is_finalized=False), jobs, NO_LIMITS)
    await nodes.one.claim(LANE, OWNER)
    before = nodes.server.command("INFO", "commandstats")["cmdstat_hmget"]["calls"]
    assert len((await nodes.one.list_jobs(JobFilter(states=("running",)))).jobs) == 1
    assert nodes.server.command("INFO", "commandstats")["cmdstat_hmget"]["calls"] - before < 10


async def test_a_submit_that_too_few_replicas_have_is_not_accepted(server, tmp_path):
    server.command("FLUSHALL")
    store = redis_queue(server, tmp_path, replicas=1)
    with pytest.raises(StoreAwayError, match="0 of 1 replicas"):
        await store.submit(a_job("job_a"), NO_LIMITS)
    await store.close()


async def test_a_frozen_redis_is_away_and_nothing_is_accepted(server, tmp_path):
    server.command("FLUSHALL")
    store = redis_queue(server, tmp_path, timeout_s=0.2)
    await store.stats()
    server.freeze()
    try:
        with pytest.raises(StoreAwayError):
            await store.submit(a_job("job_a"), NO_LIMITS)
    finally:
        server.thaw()
    await store.close()
