"""The queue as operators see it: how full it is, its jobs, cancelling and replaying them, and stopping to draw.

Owns the words and figures for management and metrics. Sees every tenant's jobs and nobody's requests or answers. Runs in
the parent; workers are told by `draw`.
"""

import time
from collections.abc import Callable
from typing import Any, Final

from gateway.control import Samples, Snapshot
from gateway.overflow.job import ALL_STATES, Job, JobFilter, LaneStats, QueueStats
from gateway.overflow.job_view import eta_of, job_document
from gateway.overflow.store import QueueStore, StoreAwayError

_MOST_LANES: Final = 200  # as labels; the deepest


class UnknownJobError(LookupError):
    """No job has this id."""


class QueueOperators:
    """One per service. `draw` tells every worker of this node whether to claim jobs from now on."""

    def __init__(self, store: QueueStore, draw: Callable[[bool], None]) -> None:
        self.is_drawing = True
        self._store = store
        self._draw = draw

    async def listed(self, query: dict[str, str], limit: int) -> dict[str, Any]:
        """A page, newest first. ValueError with a sentence."""
        state = query.get("state", "")
        if state and state not in ALL_STATES:
            raise ValueError(f"`state` is one of {', '.join(ALL_STATES)}.")
        where = JobFilter(
            tenant=query.get("tenant", ""),
            parent=query.get("parent", ""),
            lane=query.get("lane", ""),
            states=(state,) if state else (),
        )
        page = await self._store.list_jobs(where, query.get("after"), limit)
        return {"jobs": [described(job) for job in page.jobs], "next": page.cursor}

    async def shown(self, job_id: str) -> dict[str, Any]:
        """With its history and its place in the queue."""
        job = await self._store.get("", job_id)
        if job is None:
            raise UnknownJobError(job_id)
        standing = await self._store.standing("", job_id) if not job.is_final else None
        told = described(job) | {"history": job.history.splitlines(), "replayed_as": job.replayed_as or None}
        if standing is not None:
            told |= {"ahead": standing.ahead, "eta_s": eta_of(standing)}
        return told

    async def cancel(self, job_id: str) -> dict[str, Any]:
        job = await self._store.cancel("", job_id)
        if job is None:
            raise UnknownJobError(job_id)
        return described(job)

    async def replay(self, job_id: str) -> dict[str, Any]:
        """A dead job's request as a new job. ValueError when it is not dead."""
        found = await self._store.get("", job_id)
        if found is None:
            raise UnknownJobError(job_id)
        job = await self._store.replay("", job_id)
        if job is None:
            raise ValueError(
                f"This job is {found.state}: only a dead one whose request is still kept can be replayed."
            )
        return described(job)

    def drain(self, *, is_drained: bool) -> dict[str, Any]:
        """Claims nothing more on this node, until it is told otherwise or restarted; what runs goes on."""
        self.is_drawing = not is_drained
        self._draw(self.is_drawing)
        return {"is_drawing": self.is_drawing}

    async def stats(self) -> dict[str, Any]:
        stats = await self._store.stats()
        lanes = [
            {
                "lane": lane,
                "queued": each.queued,
                "delayed": each.delayed,
                "flex": each.queued_flex,
                "batch": each.queued_batch,
                "running": each.running,
                "tenants": each.tenants,
                "oldest_s": _age_s(each.oldest_queued_time, stats.now_time),
                "per_s": round(each.finished_per_s, 3),
            }
            for lane, each in sorted(stats.lanes.items())
        ]
        return {
            "is_drawing": self.is_drawing,
            "lanes": lanes,
            "states": stats.states,
            "outbox": {
                "due": stats.outbox_due,
                "waiting": stats.outbox_waiting,
                "given_up": stats.outbox_dead,
            },
            "unsettled": stats.unsettled,
        }

    async def snapshot(self) -> Snapshot:
        """For the metrics page; where the store is away, that alone."""
        try:
            stats = await self._store.stats()
        except StoreAwayError:
            return {"headgate_queue_away": _one("Whether the queue's store cannot be used.", 1)}
        return _families(stats) | {
            "headgate_queue_away": _one("Whether the queue's store cannot be used.", 0)
        }


def described(job: Job) -> dict[str, Any]:
    """What a caller sees of it, and whose it is."""
    return job_document(job) | {
        "tenant": job.tenant,
        "key": job.key_id,
        "lane": job.lane,
        "door": job.door,
        "parent": job.parent or None,
        "runs": job.runs,
        "deaths": job.deaths,
        "owner": job.owner or None,
        "age_s": round(max(0.0, time.time() - job.submitted_time), 1),
    }


def _families(stats: QueueStats) -> Snapshot:
    lanes = dict(sorted(stats.lanes.items(), key=lambda item: -item[1].queued)[:_MOST_LANES])
    depths: list[tuple[list[str], int | float | list[int | float]]] = []
    for lane, each in lanes.items():
        depths += [([lane, "flex"], each.queued_flex), ([lane, "batch"], each.queued_batch)]
    by_lane: dict[str, tuple[str, Callable[[LaneStats], float]]] = {
        "headgate_queue_jobs_running": ("Jobs that run, on all nodes.", lambda each: each.running),
        "headgate_queue_tenants": ("Tenants that have jobs ready.", lambda each: each.tenants),
        "headgate_queue_oldest_seconds": (
            "How long the oldest job has waited.",
            lambda each: _age_s(each.oldest_queued_time, stats.now_time) or 0.0,
        ),
        "headgate_queue_finished_per_second": ("Jobs that end, of late.", lambda each: each.finished_per_s),
    }
    found = {
        "headgate_queue_depth": Samples(
            "gauge", "Jobs that are ready or are tried again later.", ["lane", "class"], depths
        ),
        "headgate_queue_jobs": Samples(
            "gauge",
            "Jobs that the queue remembers, by state.",
            ["state"],
            [([state], count) for state, count in stats.states.items()],
        ),
        "headgate_queue_unsettled_rows": _one(
            "Ledger rows of jobs on their way to the ledger.", stats.unsettled
        ),
    }
    for name, (text, read) in by_lane.items():
        found[name] = Samples("gauge", text, ["lane"], [([lane], read(each)) for lane, each in lanes.items()])
    return found


def _one(text: str, value: float) -> Samples:
    return Samples("gauge", text, [], [([], value)])


def _age_s(since_time: float | None, now_time: float) -> float | None:
    return None if since_time is None else round(max(0.0, now_time - since_time), 1)
