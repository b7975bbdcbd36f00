"""Owners, callers and accidents over one store of jobs: what must hold of it, always. Q10.

A hypothesis state machine. What every job ought to be is kept a second time, in the words of the contract and without any of the
store's arithmetic; after every step each job, parent and debt is compared with it. Accidents: an operation that dies between any
two statements of its transaction (then nothing has happened, and it is repeated), an answer that is lost after the commit
(then everything has, and repeating it changes nothing), owners that die, leases that lapse, answers that come too late.
"""

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.overflow.job import DEATHS_DEAD, DEATHS_SUSPECT, FINAL, LEASE_S, Lease
from gateway.overflow.store import LeaseLostError, QueueStore, StoreAwayError
from tests.support.queue_clock import QueueClock
from tests.support.queue_jobs import LANE, NO_LIMITS, a_failure, a_job, a_key, a_parent, an_answer

OWNERS = ("o1", "o2", "o3")
KEEP_S = 200.0
OPEN = ("staged", "queued", "running", "cancelling")
STOPPED = ("cancelling", "cancelled")


class Place(Protocol):
    """Where the machine's store is: opened again after an accident, and able to have one."""

    clock: QueueClock

    async def open(self) -> QueueStore: ...

    def break_next(self, store: QueueStore, after: int) -> Callable[[], bool]:
        """The next operation dies after so many steps; whether it did, and no later one will."""

    def mute(self, store: QueueStore) -> None:
        """The next operation is carried out, and nobody hears of it: not even who does it, where that is somebody else."""

    def check(self, store: QueueStore) -> None:
        """That what the store counts is what there is."""


@dataclass
class Expected:
    """A job as it ought to be."""

    id: str
    tenant: str
    expires_time: float
    max_attempts: int
    has_news: bool
    has_reservation: bool
    parent: str = ""
    state: str = "queued"
    attempts: int = 0
    deaths: int = 0
    not_before_time: float = 0.0
    lease: Lease | None = None
    lease_until_time: float = 0.0
    finished_time: float = 0.0
    body: bytes | None = None
    is_purged: bool = False
    is_owed: bool = False  # a Settled row

    def end(self, state: str, now_time: float, *, has_row: bool = False) -> None:
        assert self.state not in FINAL
        self.state, self.lease, self.finished_time = state, None, now_time
        self.is_owed = has_row or self.has_reservation

    def lose_owner(self, now_time: float) -> None:
        self.lease = None
        if self.state == "cancelling":
            self.end("cancelled", now_time)
            return
        self.deaths += 1
        if self.deaths >= DEATHS_DEAD:
            self.end("dead", now_time)
        else:
            self.state = "queued"


@dataclass
class Family:
    """A parent as it ought to be."""

    id: str
    children: list[Expected] = field(default_factory=list)
    is_cancelled: bool = False

    @property
    def state(self) -> str:
        if any(child.state in OPEN for child in self.children):
            return "cancelling" if self.is_cancelled else "in_progress"
        return "cancelled" if self.is_cancelled else "completed"


def machine(open_place: Callable[[asyncio.AbstractEventLoop], Place]) -> type[RuleBasedStateMachine]:
    """The machine over a store that is new for every run."""

    class QueueMachine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.loop = asyncio.new_event_loop()
            self.place = open_place(self.loop)
            self.clock = self.place.clock
            self.store = self.run(self.place.open())
            self.jobs: dict[str, Expected] = {}
            self.keys: dict[bytes, str] = {}
            self.families: dict[str, Family] = {}
            self.leases: list[Lease] = []  # every one there ever was
            self.owed: dict[str, str] = {}  # by job, what became of its Settled row
            self.accident: tuple[str, int] | None = None
            self.numbers = itertools.count()

        def run(self, work: Awaitable[Any]) -> Any:
            return self.loop.run_until_complete(work)

        def do(self, operation: Callable[[], Awaitable[Any]], *, may_repeat: bool = True) -> Any:
            """The operation's answer, an accident before or after it notwithstanding."""
            accident, self.accident = self.accident, None
            if accident is not None and accident[0] == "dies":
                has_died = self.place.break_next(self.store, accident[1])
                try:
                    answer = self.run(operation())
                except Exception as error:
                    if not has_died():
                        raise
                    del error
                    self.compare()  # nothing has happened
                    self.open_again()
                else:
                    has_died()
                    return answer
            elif accident is not None and may_repeat:
                if accident[1] % 2:
                    self.place.mute(self.store)
                with contextlib.suppress(StoreAwayError):
                    self.run(operation())
                self.open_again()  # and nobody heard of it
            return self.run(operation())

        def open_again(self) -> None:
            self.run(self.store.close())
            self.store = self.run(self.place.open())

        @property
        def now(self) -> float:
            return self.clock.time_s

        # -- accidents and time

        @rule(kind=st.sampled_from(["dies", "is unheard"]), after=st.integers(0, 14))
        def have_an_accident(self, kind: str, after: int) -> None:
            self.accident = (kind, after)

        @rule(seconds=st.sampled_from([1.0, 5.0, LEASE_S + 1, 70.0, KEEP_S + 1]))
        def wait(self, seconds: float) -> None:
            self.clock.forward(seconds)

        # -- callers

        @rule(
            tenant=st.sampled_from(["t1", "t2", "t3"]),
            key=st.sampled_from([b"", b"", b"k1", b"k2"]),
            job_class=st.sampled_from(["flex", "batch"]),
            expires_in_s=st.sampled_from([60.0, 3600.0]),
            max_attempts=st.integers(1, 3),
            flags=st.tuples(st.booleans(), st.booleans()),
        )
        def submit(self, tenant, key, job_class, expires_in_s, max_attempts, flags) -> None:
            has_news, has_reservation = flags
            new = a_job(
                f"job_{next(self.numbers)}",
                tenant,
                job_class=job_class,
                expires_in_s=expires_in_s,
                max_attempts=max_attempts,
                keep_s=KEEP_S,
                webhook="hook" if has_news else "",
                reservation=b"r" if has_reservation else b"",
                idempotency=a_key(tenant.encode() + key) if key else None,
            )
            scope = tenant.encode() + key
            known = self.keys.get(scope) if key else None
            made = self.do(lambda: self.store.submit(new, NO_LIMITS))
            if known is not None and not self.jobs[known].is_purged:
                assert made.job.id == known
                return
            assert made.job.id == new.id
            if key:
                self.keys[scope] = new.id
            self.jobs[new.id] = Expected(
                new.id, tenant, self.now + expires_in_s, max_attempts, has_news, has_reservation
            )

        @rule(children=st.integers(1, 3))
        def submit_together(self, children: int) -> None:
            name = f"batch_{next(self.numbers)}"
            new = [
                a_job(f"job_{next(self.numbers)}", "t1", keep_s=KEEP_S, expires_in_s=3600.0)
                for _ in range(children)
            ]
            parent = a_parent(name, "t1", is_finalized=False, webhook="hook")
            self.do(lambda: self.store.submit_all(parent, new, NO_LIMITS))
            family = self.families[name] = Family(name)
            for job in new:
                child = Expected(job.id, "t1", self.now + 3600.0, 5, False, False, parent=name)
                self.jobs[job.id] = child
                family.children.append(child)

        @precondition(lambda self: self.jobs)
        @rule(data=st.data())
        def cancel(self, data) -> None:
            job = self.jobs[data.draw(st.sampled_from(sorted(self.jobs)))]
            self.do(lambda: self.store.cancel(job.tenant, job.id))
            if job.state == "queued":
                job.end("cancelled", self.now)
            elif job.state == "running":
                job.state = "cancelling"

        @precondition(lambda self: self.families)
        @rule(data=st.data())
        def cancel_together(self, data) -> None:
            family = self.families[data.draw(st.sampled_from(sorted(self.families)))]
            self.do(lambda: self.store.cancel_parent("t1", family.id))
            if family.state != "in_progress":
                return
            family.is_cancelled = True
            for child in family.children:
                if child.state == "queued":
                    child.end("cancelled", self.now)
                elif child.state == "running":
                    child.state = "cancelling"

        # -- owners

        def claimable(self, *, is_alone: bool) -> list[Expected]:
            return [
                job
                for job in self.jobs.values()
                if job.state == "queued"
                and job.not_before_time <= self.now < job.expires_time
                and (job.deaths >= DEATHS_SUSPECT) == is_alone
            ]

        @rule(owner=st.sampled_from(OWNERS), is_alone=st.sampled_from([False, False, False, True]))
        def claim(self, owner: str, is_alone: bool) -> None:
            own = [job for job in self.jobs.values() if job.lease is not None and job.lease.owner == owner]
            may = not any(job.deaths >= DEATHS_SUSPECT for job in own) and not (is_alone and own)
            found = self.claimable(is_alone=is_alone)
            claimed = self.do(lambda: self.store.claim(LANE, owner, is_alone=is_alone), may_repeat=False)
            if not may or not found:
                assert claimed is None
                return
            assert claimed is not None, found
            job = self.jobs[claimed.job.id]
            assert job in found
            assert all(lease.fence < claimed.lease.fence for lease in self.leases if lease.job_id == job.id)
            assert claimed.lease.owner == owner
            job.state, job.lease, job.lease_until_time = "running", claimed.lease, self.now + LEASE_S
            self.leases.append(claimed.lease)

        def drawn(self, data) -> tuple[Lease, Expected, bool]:
            """Any lease there ever was; whether it is good."""
            lease = data.draw(st.sampled_from(self.leases))
            job = self.jobs[lease.job_id]
            return lease, job, job.lease == lease

        @precondition(lambda self: self.leases)
        @rule(data=st.data(), state=st.sampled_from(["succeeded", "succeeded", "failed", "cancelled"]))
        def finish(self, data, state: str) -> None:
            lease, job, is_good = self.drawn(data)
            body = f"{lease.job_id} {lease.fence}".encode()
            outcome = an_answer(body, state=state)
            try:
                ended = self.do(lambda: self.store.finish(lease, outcome))
            except LeaseLostError:
                assert not is_good
                return
            if is_good:
                assert ended.state == state
                job.end(state, self.now, has_row=True)
                job.body = body
            else:  # its own finish, repeated
                assert (job.state in FINAL, ended.owner, ended.fence) == (True, lease.owner, lease.fence)

        @precondition(lambda self: self.leases)
        @rule(data=st.data(), retry_in_s=st.sampled_from([0.0, 5.0, 90.0]), is_counted=st.booleans())
        def fail(self, data, retry_in_s: float, is_counted: bool) -> None:
            lease, job, is_good = self.drawn(data)
            failure = a_failure(retry_in_s=retry_in_s, is_counted=is_counted, ledger_row=b"row")
            try:
                self.do(lambda: self.store.fail(lease, failure), may_repeat=False)
            except LeaseLostError:
                assert not is_good
                return
            assert is_good
            job.attempts += is_counted
            is_last = job.attempts >= job.max_attempts
            if job.state == "cancelling":
                job.end("cancelled", self.now, has_row=True)
            elif is_last:
                job.end("dead", self.now, has_row=True)
            elif self.now + retry_in_s >= job.expires_time:
                job.end("expired", self.now, has_row=True)
            else:
                job.state, job.lease, job.not_before_time = "queued", None, self.now + retry_in_s

        @precondition(lambda self: self.leases)
        @rule(data=st.data())
        def release(self, data) -> None:
            lease, job, is_good = self.drawn(data)
            assert self.do(lambda: self.store.release([lease]), may_repeat=False) == [job.id] * is_good
            if is_good and job.state == "cancelling":
                job.end("cancelled", self.now)
            elif is_good:
                job.state, job.lease, job.not_before_time = "queued", None, 0.0

        @precondition(lambda self: self.leases)
        @rule(data=st.data())
        def renew(self, data) -> None:
            lease, job, is_good = self.drawn(data)
            assert self.do(lambda: self.store.renew([lease])) == ({job.id: job.state} if is_good else {})
            if is_good:
                job.lease_until_time = self.now + LEASE_S

        @rule(owner=st.sampled_from(OWNERS))
        def die(self, owner: str) -> None:
            own = [job for job in self.jobs.values() if job.lease is not None and job.lease.owner == owner]
            self.do(lambda: self.store.owner_died(owner))
            for job in own:
                job.lose_owner(self.now)

        @rule()
        def sweep(self) -> None:
            self.do(lambda: self.store.sweep(200))
            for job in self.jobs.values():
                if job.lease is not None and job.lease_until_time <= self.now:
                    if job.expires_time <= self.now and job.state != "cancelling":
                        job.end("expired", self.now)
                    else:
                        job.lose_owner(self.now)
                if job.state not in FINAL and job.expires_time <= self.now:
                    job.end("expired", self.now)
                elif job.state in FINAL and job.finished_time + KEEP_S <= self.now:
                    job.is_purged = True

        # -- the ledger

        @rule(acks=st.booleans())
        def enter_into_the_ledger(self, acks: bool) -> None:
            rows = self.do(lambda: self.store.take_settled("flow"), may_repeat=False)
            for row in rows:
                assert self.jobs[row.job_id].is_owed
                assert self.owed.get(row.job_id) != "entered", "billed twice"
            if acks:
                acked = self.run(self.store.ack_settled(rows))
                assert sorted(acked) == sorted(row.job_id for row in rows)
                assert self.run(self.store.ack_settled(rows)) == []
                self.owed.update(dict.fromkeys(acked, "entered"))

        # -- what always holds

        @invariant()
        def compare(self) -> None:
            self.run(self._compare())
            self.place.check(self.store)

        async def _compare(self) -> None:
            """Asks for everything at once: a store may answer many in one trip."""
            store, jobs = self.store, list(self.jobs.values())
            *found, stats = await asyncio.gather(
                *(store.get(job.tenant, job.id) for job in jobs), store.stats()
            )
            for job, row in zip(jobs, found, strict=True):
                assert row is not None, f"{job.id} is lost"
                # A claim ends those it comes by, a sweep the others.
                if job.state == "queued" and job.expires_time <= self.now and row.state == "expired":
                    job.end("expired", row.finished_time)
                assert row.state == job.state, (job, row.history)
                assert (row.attempts, row.deaths) == (job.attempts, job.deaths)
                assert row.is_purged == job.is_purged
                ends = [word in FINAL for word in states_of(row.history)].count(True)
                assert ends == (job.state in FINAL)
            ended = [job for job in jobs if job.state in FINAL]
            results = await asyncio.gather(*(store.result(job.tenant, job.id) for job in ended))
            told = await asyncio.gather(*(store.list_outbox(job.id) for job in ended))
            for job, result, news in zip(ended, results, told, strict=True):
                assert (None if result is None else result.body) == (None if job.is_purged else job.body)
                assert [(each.state, each.webhook) for each in news] == [(job.state, "hook")] * job.has_news
            parents = await asyncio.gather(*(store.get_parent("t1", name) for name in self.families))
            for family, parent in zip(self.families.values(), parents, strict=True):
                assert parent is not None
                assert parent.state == family.state
                states = [child.state for child in family.children]
                assert parent.counts == {state: states.count(state) for state in states}
            assert stats.states == Counter(job.state for job in jobs)
            owed = {job.id for job in jobs if job.is_owed}
            assert stats.unsettled == len(owed - self.owed.keys())

        def teardown(self) -> None:
            self.run(self.store.close())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
            self.loop.close()

    return QueueMachine


def states_of(history: str) -> list[str]:
    return [line.split()[1] for line in history.splitlines()]
