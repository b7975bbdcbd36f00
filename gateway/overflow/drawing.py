"""Draws jobs out of the queue while there is room for them, and keeps hold of those that run here.

Owns when it is asked for work, the leases and their renewal, what is to be stopped and why, and the end of it all when
the worker drains. What runs is `running`'s, how much may run `headroom`'s. Invariants: nothing is claimed that there is no
room for, but a trickle; a lease that could not be renewed in time, or was lost, ends its run at once; after `stop` this
worker has no lease.
"""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final

from gateway.overflow.headroom import Headroom, Load, Room
from gateway.overflow.job import LEASE_S, RENEW_S, Claimed, JobFilter, LaneStats
from gateway.overflow.running import Ended, Run, Runner
from gateway.overflow.store import QueueStore, StoreAwayError
from gateway.runtime import Runtime

_POLL_S: Final = (
    0.5  # with work in the queue; a job handed in here, or a slot that is free again, is seen at once
)
_IDLE_POLL_S: Final = 1.0
_RAMP_POLL_S: Final = 0.05
_AT_ONCE: Final = 32  # claims under way for one lane
_TICK_S: Final = 1.0
_CLAIM_S: Final = 5.0
_SWEEP_S: Final = 5.0
_SWEEPS_AT_ONCE: Final = 50
# Of a lease that could not be renewed; what is left of it is for stopping.
_TRUSTED_S: Final = 0.9 * LEASE_S
_AWAY_S: Final = 1.0
_LOG_EVERY_S: Final = 10.0

_log = logging.getLogger(__name__)


class Drawing:
    """One per worker. `counts` and `dwell_s` are since its start, for metrics."""

    def __init__(
        self,
        store: QueueStore,
        owner: str,
        runner: Runner,
        headroom: Headroom,
        runtime: Callable[[], Runtime],
        limit_bytes: int,
    ) -> None:
        self.owner = owner
        self.counts: dict[tuple[str, str], int] = {}  # by class and what became of a run
        self.claims: dict[str, int] = {}  # by class
        self.dwell_s = 0.0
        self._store = store
        self._runner = runner
        self._headroom = headroom
        self._runtime = runtime
        self._limit_bytes = limit_bytes
        self._runs: dict[str, tuple[Run, str]] = {}  # by job: the run, and the pool it was claimed for
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready: dict[str, int] = {}  # by lane, what can be claimed now, as far as is known
        self._suspects: dict[str, int] = {}  # by lane, those that must run alone
        self._is_alone = False  # with one of those
        self._is_open = True
        self._is_paused = False
        self._wanted = asyncio.Event()
        self._polled_at = 0.0
        self._renewed_at = time.monotonic()
        self._logged_at = -_LOG_EVERY_S
        self._loops: list[asyncio.Task[None]] = []

    @property
    def running(self) -> int:
        return len(self._runs)

    def running_by_pool(self) -> dict[str, int]:
        return self._load().running

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._loops = [
            loop.create_task(self._forever(self._draw, until_closed=True), name="queue-draw"),
            loop.create_task(self._forever(self._keep), name="queue-leases"),
            loop.create_task(self._forever(self._sweep), name="queue-sweep"),
        ]

    def hint(self, lane: str) -> None:
        """A job of this lane was handed in here, or may be claimed again."""
        self._ready[lane] = self._ready.get(lane, 0) + 1
        self._wanted.set()

    def room_freed(self) -> None:
        """Somewhere a request has ended. Costs nothing while nothing waits."""
        if self._ready:
            self._wanted.set()

    def cancelled(self, job_id: str) -> None:
        """Its caller has cancelled it, through us: no need to wait until the store says so."""
        found = self._runs.get(job_id)
        if found is not None:
            found[0].stop("cancelled")

    def pause(self, *, is_paused: bool) -> None:
        """Claims nothing for now; what runs goes on."""
        self._is_paused = is_paused
        self._wanted.set()

    def close(self) -> None:
        """Claims nothing any more; what runs goes on."""
        self._is_open = False
        self._wanted.set()

    async def drain(self, timeout_s: float) -> None:
        """Until what runs has ended; what has not within the time goes back to the queue."""
        self.close()
        if self._loops:
            await asyncio.wait(
                {self._loops[0]}, timeout=_CLAIM_S
            )  # whose latest claims are started, or given back
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=timeout_s)
        for run, _ in list(self._runs.values()):
            run.stop("drained")
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=LEASE_S)

    async def stop(self) -> None:
        """After `drain`. What the store has still not taken back, lapses."""
        for task in (*self._loops, *self._tasks):
            task.cancel()
        if self._loops or self._tasks:
            await asyncio.wait({*self._loops, *self._tasks})

    # drawing

    async def _draw(self) -> None:
        now = time.monotonic()
        if self._is_open and now - self._polled_at >= (_POLL_S if self._ready else _IDLE_POLL_S):
            self._polled_at = now
            self._take_in((await self._store.stats()).lanes)
        if self._is_open and not self._is_alone and not self._is_paused:
            if self._suspects:
                await self._draw_suspect()
            else:
                lanes = list(self._ready)
                random.shuffle(lanes)  # lanes that share a pool take turns
                for lane in lanes:
                    await self._draw_lane(lane)
        delay_s = _POLL_S if self._ready or self._runs else _IDLE_POLL_S
        if self._headroom.is_ramping:
            delay_s, self._headroom.is_ramping = _RAMP_POLL_S, False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(delay_s * (0.75 + 0.5 * random.random())):  # noqa: S311 - only jitter
                await self._wanted.wait()
        self._wanted.clear()

    def _take_in(self, lanes: dict[str, LaneStats]) -> None:
        # Those that are delayed are among them: a claim sees whether their time has come.
        self._ready = {
            lane: ready for lane, stats in lanes.items() if (ready := stats.queued - stats.solitary) > 0
        }
        self._suspects = {lane: stats.solitary for lane, stats in lanes.items() if stats.solitary}

    async def _draw_lane(self, lane: str) -> None:
        """Claims while there is room, a few at a time, and starts what it gets."""
        while self._is_open and (ready := self._ready.get(lane, 0)) > 0:
            room = self._room(lane)
            if room is None:
                return
            count = min(room.slots, ready, _AT_ONCE)
            claims = [self._store.claim(lane, self.owner) for _ in range(count)]
            found = await asyncio.gather(*claims, return_exceptions=True)
            claimed = [each for each in found if isinstance(each, Claimed)]
            if not self._is_open:
                await self._store.release([each.lease for each in claimed])
                return
            for each in claimed:
                self._start(each, room)
            errors = [each for each in found if isinstance(each, BaseException)]
            if errors:
                raise errors[0]
            more = self._ready.get(lane, 0) - ready  # was handed in here meanwhile
            left = more if len(claimed) < count else ready - count + more
            self._ready[lane] = left
            if left <= 0:
                del self._ready[lane]  # until the store is asked again, or somebody says so
                return
            if room.is_trickle:
                return

    async def _draw_suspect(self) -> None:
        """One that may have killed its process runs alone: what runs is let end first."""
        if self._runs:
            return
        lane = next(iter(self._suspects))
        self._suspects = {}
        room = self._room(lane)
        claimed = None if room is None else await self._store.claim(lane, self.owner, is_alone=True)
        if claimed is not None and room is not None:
            self._is_alone = True
            self._start(claimed, room)

    def _room(self, lane: str) -> Room | None:
        return self._headroom.room(lane, self._load(), self._runtime(), time.perf_counter())

    def _load(self) -> Load:
        load = Load({}, {})
        for run, pool in self._runs.values():
            load.running[pool] = load.running.get(pool, 0) + 1
            if not run.is_sent:
                load.unsent[pool] = load.unsent.get(pool, 0) + 1
        return load

    def _start(self, claimed: Claimed, room: Room) -> None:
        job = claimed.job
        run = Run(claimed, self._limit_bytes)
        self._runs[job.id] = (run, room.pool)
        self._headroom.started(room.pool, time.perf_counter())
        self.claims[job.job_class] = self.claims.get(job.job_class, 0) + 1
        if job.runs == 1 and job.started_time is not None:
            self.dwell_s += max(0.0, job.started_time - job.submitted_time)
        task = asyncio.get_running_loop().create_task(self._run(run, waits=room.is_trickle))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, run: Run, *, waits: bool) -> None:
        job, ended = run.job, None
        try:
            ended = await self._runner.run(run, waits=waits)
        except Exception:  # noqa: BLE001 - a bug ends one run; its lease lapses, and the job is tried again
            _log.exception("the run of a job failed through a bug", extra={"request_id": job.id})
        finally:
            in_flight = self._load().running
            del self._runs[job.id]
            self._is_alone = False
            outcome = ended.job.state if ended is not None and ended.job is not None else "lost"
            key = (job.job_class, run.stopped or outcome)
            self.counts[key] = self.counts.get(key, 0) + 1
            if ended is not None:
                self._learn(ended, in_flight)
            self._wanted.set()

    def _learn(self, ended: Ended, in_flight: dict[str, int]) -> None:
        now = time.perf_counter()
        if ended.kind == "answered":
            self._headroom.answered(ended.pool, in_flight.get(ended.pool, 1), ended.headers, now)
        elif ended.kind == "refused":
            self._headroom.refused(ended.pool, ended.retry_after_s, ended.headers, now)

    # holding

    async def _keep(self) -> None:
        """Renews leases, and ends runs that have none any more."""
        await asyncio.sleep(_TICK_S)
        now = time.monotonic()
        if not self._runs:
            self._renewed_at = now
            return
        try:
            if now - self._renewed_at >= RENEW_S:
                await self._renew(now)
            page = await self._store.list_jobs(JobFilter(states=("cancelling",)), limit=100)
            for job in page.jobs:
                self.cancelled(job.id)
        finally:
            # Asked too late is as good as refused: somebody else may have the job by now.
            for run, _ in list(self._runs.values()):
                if time.monotonic() - max(self._renewed_at, run.claimed_at) > _TRUSTED_S:
                    run.stop("lost")

    async def _renew(self, now: float) -> None:
        runs = [run for run, _ in self._runs.values() if run.stopped != "lost"]
        states = await self._store.renew([run.lease for run in runs])
        self._renewed_at = now
        for run in runs:
            state = states.get(run.job.id)
            if run.job.id not in self._runs:
                continue  # ended meanwhile
            if state is None:
                run.stop("lost")
            elif state == "cancelling":
                run.stop("cancelled")

    async def _sweep(self) -> None:
        await asyncio.sleep(_SWEEP_S * (0.5 + random.random()))  # noqa: S311 - only jitter
        for _ in range(_SWEEPS_AT_ONCE):
            if (await self._store.sweep()).is_all:
                return

    async def _forever(self, turn: Callable[[], Awaitable[None]], *, until_closed: bool = False) -> None:
        while self._is_open or not until_closed:
            try:
                await turn()
            except StoreAwayError as error:
                self._log_away(error)
                await asyncio.sleep(_AWAY_S)
            except Exception:  # noqa: BLE001 - the next turn may do
                _log.exception("the queue failed through a bug")
                await asyncio.sleep(_AWAY_S)

    def _log_away(self, error: StoreAwayError) -> None:
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            _log.error("the queue's store cannot be used: %s", error)
