"""Leases of jobs that run here: renewed, lost, cancelled, given back. The store is scripted, nothing else is."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from gateway.overflow import drawing
from gateway.overflow.drawing import Drawing
from gateway.overflow.headroom import Room
from gateway.overflow.job import Claimed, JobPage, LaneStats, Lease, QueueStats
from gateway.overflow.running import Ended
from gateway.overflow.store import StoreAwayError
from tests.gateway.overflow.test_running import job
from tests.mutants import drawing as mutants


class ScriptedStore:
    """Hands out so many jobs; `states` is what a renewal says of each."""

    def __init__(self, jobs, solitary=0):
        self.left, self.solitary = jobs, solitary
        self.claims, self.released, self.states, self.is_away = [], [], {}, False
        self.renewals = 0

    async def stats(self):
        lanes = {"m": LaneStats(queued=self.left, solitary=self.solitary)} if self.left else {}
        return QueueStats(
            lanes=lanes, states={}, outbox_due=0, outbox_waiting=0, outbox_dead=0, unsettled=0, now_time=0.0
        )

    async def claim(self, lane, owner, *, is_alone=False):
        if not self.left or (self.solitary > 0) != is_alone:
            return None
        self.left -= 1
        self.solitary -= is_alone
        made = job(id=f"job_{len(self.claims)}", lane=lane)
        self.claims.append(made.id)
        return Claimed(
            job=made, lease=Lease(made.id, 1, owner), body=b"", headers=b"", caller=b"", reservation=b"",
            carried=b"", is_solitary=is_alone,
        )  # fmt: skip

    async def renew(self, leases):
        if self.is_away:
            raise StoreAwayError("away")
        self.renewals += 1
        return {
            lease.job_id: self.states.get(lease.job_id, "running")
            for lease in leases
            if self.states.get(lease.job_id) != "lost"
        }

    async def list_jobs(self, where, cursor=None, limit=20):
        return JobPage([], None)

    async def release(self, leases, retry_in_s=0.0):
        self.released += [lease.job_id for lease in leases]
        return [lease.job_id for lease in leases]

    async def sweep(self, most=200):
        return SimpleNamespace(is_all=True)


class ScriptedRunner:
    """A run lasts until it is stopped, or told to end."""

    def __init__(self):
        self.runs, self.end, self.most = {}, asyncio.Event(), 0

    async def run(self, run, *, waits):
        self.runs[run.job.id] = run
        self.most = max(self.most, sum(each.handled is None for each in self.runs.values()))
        ending = asyncio.ensure_future(self.end.wait())
        while not ending.done() and run.stopped is None:
            await asyncio.sleep(0.001)
        ending.cancel()
        run.handled = ending
        return Ended("answered", "p", None, (), run.job)


class Service:
    def __init__(self, store, slots=100):
        self.store, self.runner, self.slots = store, ScriptedRunner(), slots
        headroom = SimpleNamespace(
            room=self.room,
            is_ramping=False,
            started=lambda *_: None,
            answered=lambda *_: None,
            refused=lambda *_: None,
        )
        self.drawing = Drawing(store, "w", self.runner, headroom, lambda: None, 1000)

    def room(self, lane, load, runtime, now):
        left = self.slots - load.running.get("p", 0)
        return Room(left, "p") if left > 0 else None

    @property
    def stopped(self):
        return {name: run.stopped for name, run in self.runner.runs.items()}


@pytest.fixture
async def begun(monkeypatch):
    """Starts drawings with a clock that hurries; all end with the test."""
    for name, value in {
        "_TICK_S": 0.01,
        "RENEW_S": 0.02,
        "_POLL_S": 0.01,
        "_IDLE_POLL_S": 0.01,
        "_AWAY_S": 0.01,
    }.items():
        monkeypatch.setattr(drawing, name, value)
    services = []

    def begin(store, slots=100):
        service = Service(store, slots)
        services.append(service)
        service.drawing.start()
        return service

    yield begin
    for service in services:
        service.runner.end.set()
        await service.drawing.drain(5.0)
        await service.drawing.stop()


async def until(is_so):
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.002)


async def test_it_claims_what_there_is_room_for_and_more_when_that_has_ended(begun):
    service = begun(ScriptedStore(10), slots=4)
    await until(lambda: len(service.runner.runs) == 4)
    await until(lambda: service.store.renewals > 1)
    assert len(service.store.claims) == 4
    service.runner.end.set()
    await until(lambda: len(service.store.claims) == 10)
    assert service.runner.most <= 4


async def test_a_lease_that_is_lost_ends_its_run_at_once(begun):
    service = begun(ScriptedStore(2))
    await until(lambda: len(service.runner.runs) == 2)
    service.store.states = {"job_1": "lost"}
    await until(lambda: service.stopped["job_1"] == "lost")
    assert service.stopped["job_0"] is None


async def test_a_lease_that_cannot_be_renewed_in_time_is_taken_for_lost(begun, monkeypatch):
    service = begun(ScriptedStore(1))
    await until(lambda: service.store.renewals > 0)
    service.store.is_away = True
    monkeypatch.setattr(drawing, "_TRUSTED_S", 0.1)
    await until(lambda: service.stopped["job_0"] == "lost")


async def test_a_job_that_is_being_cancelled_is_stopped(begun):
    service = begun(ScriptedStore(1))
    await until(lambda: len(service.runner.runs) == 1)
    service.store.states = {"job_0": "cancelling"}
    await until(lambda: service.stopped["job_0"] == "cancelled")


async def test_a_suspect_runs_alone(begun):
    store = ScriptedStore(3)
    service = begun(store)
    await until(lambda: len(service.runner.runs) == 3)
    store.left, store.solitary = 1, 1
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert len(store.claims) == 3, "not beside the others"
    service.runner.end.set()
    await until(lambda: len(store.claims) == 4)


async def test_a_drain_gives_back_what_does_not_end(begun):
    service = begun(ScriptedStore(2))
    await until(lambda: len(service.runner.runs) == 2)
    await service.drawing.drain(0.01)
    assert set(service.stopped.values()) == {"drained"}
    assert service.drawing.running == 0


async def test_nothing_is_claimed_while_it_is_paused(begun):
    service = begun(ScriptedStore(0))
    service.drawing.pause(is_paused=True)
    service.store.left = 5
    service.drawing.hint("m")
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert not service.store.claims
    service.drawing.pause(is_paused=False)
    await until(lambda: len(service.store.claims) == 5)


# Broken builds


@pytest.mark.parametrize(
    ("breaks", "promise"),
    [
        (mutants.ignores_lost_leases, test_a_lease_that_is_lost_ends_its_run_at_once),
        (mutants.claims_what_it_can_get, test_it_claims_what_there_is_room_for_and_more_when_that_has_ended),
    ],
)
async def test_a_broken_build_is_caught(begun, monkeypatch, breaks, promise):
    breaks(monkeypatch)

    async def soon(is_so):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2):
                while not is_so():
                    await asyncio.sleep(0.002)
        assert is_so()

    monkeypatch.setitem(globals(), "until", soon)
    with pytest.raises((AssertionError, KeyError)):
        await promise(begun)
