"""The queue of one machine: queue.db, shared by all of its workers.

A QueueStore over `gateway.stores.queue_thread`: what is returned is synced to disk. Reads have a connection of their own and
wait for nobody. Owns nothing but the way from records to rows and back.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from gateway.overflow.bodies import Bodies
from gateway.overflow.job import (
    Claimed,
    Event,
    Failure,
    Job,
    JobFilter,
    JobPage,
    Lease,
    NewJob,
    NewParent,
    OutboxRow,
    Outcome,
    Parent,
    ParentLease,
    ParentState,
    QueueStats,
    Result,
    Settled,
    Standing,
    State,
    Submitted,
    Swept,
    TenantLimits,
)
from gateway.overflow.store import StoreAwayError
from gateway.stores import queue_jobs, queue_owed, queue_parents, queue_sweep, queue_turns
from gateway.stores.limit_sqlite import Clocks
from gateway.stores.queue_content import Content
from gateway.stores.queue_jobs import Answer
from gateway.stores.queue_list import list_rows
from gateway.stores.queue_schema import LEASES, STEPS, SUSPECT, JobRow, find, find_parent, job_of, parent_of
from gateway.stores.queue_thread import StoreThread, Work
from gateway.stores.sqlite import Connection, StorageError

DATABASE_NAME: Final = "queue.db"
_T = TypeVar("_T")


class SqliteQueueStore:
    """A QueueStore. StorageError from the constructor when the storage directory cannot be used.

    `result_folder`: where results go that are too large for the database; None: they are refused."""

    def __init__(
        self,
        storage: Path,
        *,
        bodies: Bodies | None = None,
        result_folder: Path | None = None,
        clocks: Clocks | None = None,
    ) -> None:
        self._content = Content(bodies, result_folder)
        self._thread = StoreThread(storage / DATABASE_NAME, STEPS, leases=LEASES, clocks=clocks)

    # -- handing in

    async def submit(self, job: NewJob, limits: TenantLimits) -> Submitted:
        (stored,) = await self._content.stored([job])

        def work(connection: Connection, now_time: float) -> tuple[JobRow, bool]:
            return queue_jobs.submit(connection, stored, limits, now_time)

        row, is_new = await self._thread.write(work)
        return Submitted(job_of(row), is_new)

    async def submit_all(
        self, parent: NewParent, jobs: Sequence[NewJob], limits: TenantLimits
    ) -> tuple[Parent, bool]:
        stored = await self._content.stored(jobs)

        def work(connection: Connection, now_time: float) -> tuple[Parent, bool]:
            row, is_new = queue_parents.submit_all(connection, parent, stored, limits, now_time)
            return parent_of(row), is_new

        return await self._thread.write(work)

    async def open_parent(self, parent: NewParent, owner: str) -> tuple[Parent, ParentLease | None]:
        def work(connection: Connection, now_time: float) -> tuple[Parent, ParentLease | None]:
            row, lease = queue_parents.open_parent(connection, parent, owner, now_time)
            return parent_of(row), lease

        return await self._thread.write(work)

    async def append_children(
        self, lease: ParentLease, first: int, jobs: Sequence[NewJob], limits: TenantLimits
    ) -> Parent:
        stored = await self._content.stored(jobs)

        def work(connection: Connection, now_time: float) -> Parent:
            row = queue_parents.append_children(connection, lease, first, stored, limits, now_time)
            return parent_of(row)

        return await self._thread.write(work)

    async def release_parent(self, lease: ParentLease, most: int = 500) -> int:
        return await self._thread.write(lambda c, now: queue_parents.release_parent(c, lease, most, now))

    async def fail_parent(self, lease: ParentLease, details: bytes) -> Parent:
        return await self._thread.write(
            lambda c, now: parent_of(queue_parents.fail_parent(c, lease, details, now))
        )

    # -- running

    async def claim(self, lane: str, owner: str, *, is_alone: bool = False) -> Claimed | None:
        line = SUSPECT + lane if is_alone else lane

        def work(connection: Connection, now_time: float) -> queue_jobs.Run | None:
            return queue_jobs.claim(connection, lane, owner, now_time, is_alone=is_alone)

        run = await self._thread.write(work, lambda c, now: queue_turns.has_ready(c, line, now))
        if run is None:
            return None
        row, read = run.row, self._read
        return Claimed(
            job=job_of(row),
            lease=Lease(row.id, row.fence, row.owner),
            body=read(run.body, row.id, "body"),
            headers=read(run.headers, row.id, "headers"),
            caller=run.caller,
            reservation=run.reservation,
            carried=run.carried,
            is_solitary=is_alone,
        )

    async def renew(self, leases: Sequence[Lease]) -> dict[str, State]:
        return await self._thread.write(lambda c, now: queue_jobs.renew(c, leases, now))

    async def finish(self, lease: Lease, outcome: Outcome) -> Job:
        answer = await self._answer(lease, outcome.result)
        return await self._ended(answer, lambda c, now: queue_jobs.finish(c, lease, outcome, answer, now))

    async def fail(self, lease: Lease, failure: Failure) -> Job:
        answer = await self._answer(lease, failure.result)
        return await self._ended(answer, lambda c, now: queue_jobs.fail(c, lease, failure, answer, now))

    async def _ended(self, answer: Answer | None, work: Work[tuple[JobRow, bool]]) -> Job:
        """Runs it; a file that is not the job's result after all is removed."""
        is_kept = False
        try:
            row, is_kept = await self._thread.write(work)
            return job_of(row)
        except StoreAwayError:
            is_kept = True  # perhaps
            raise
        finally:
            if answer is not None and answer.file and not is_kept:
                self._content.remove([answer.file])

    async def _answer(self, lease: Lease, result: Result | None) -> Answer | None:
        try:
            return await self._content.answer(lease, result)
        except StorageError as error:
            raise StoreAwayError(str(error)) from error

    async def release(self, leases: Sequence[Lease], retry_in_s: float = 0.0) -> list[str]:
        return await self._thread.write(lambda c, now: queue_jobs.release(c, leases, retry_in_s, now))

    async def owner_died(self, owner: str) -> int:
        return await self._thread.write(lambda c, now: queue_jobs.owner_died(c, owner, now))

    # -- its caller's side

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        row = await self._thread.write(lambda c, now: queue_jobs.cancel(c, tenant, job_id, now))
        return None if row is None else job_of(row)

    async def get(self, tenant: str, job_id: str) -> Job | None:
        row = await self._thread.read(lambda c, _: find(c, job_id, tenant))
        return None if row is None else job_of(row)

    async def result(self, tenant: str, job_id: str) -> Result | None:
        def work(connection: Connection, _: float) -> Answer | None:
            row = find(connection, job_id, tenant)
            if row is None:
                return None
            query = "SELECT headers, body, file FROM result WHERE seq = ?"
            for headers, body, file in connection.execute(query, (row.seq,)):
                return Answer(row.status, row.result_bytes, headers, body, file)
            return None

        answer = await self._thread.read(work)
        if answer is None:
            return None
        try:
            return await self._content.result(job_id, answer)
        except StorageError as error:
            raise StoreAwayError(str(error)) from error

    async def purge(self, tenant: str, job_id: str) -> Job | None:
        row, files = await self._thread.write(lambda c, now: queue_sweep.purge(c, tenant, job_id, now))
        self._content.remove(files)
        if row is not None and row.is_purged:
            await self._thread.checkpoint()
        return None if row is None else job_of(row)

    async def list_jobs(self, where: JobFilter, cursor: str | None = None, limit: int = 20) -> JobPage:
        rows, after = await self._thread.read(lambda c, _: list_rows(c, where, cursor, limit))
        return JobPage([job_of(row) for row in rows], after)

    async def standing(self, tenant: str, job_id: str) -> Standing | None:
        def work(connection: Connection, now_time: float) -> Standing | None:
            row = find(connection, job_id, tenant)
            if row is None:
                return None
            ahead = queue_turns.ahead(connection, row) if row.state == "queued" else 0
            lane = queue_turns.lane_stats(connection, row.lane, now_time)
            return Standing(state=row.state, ahead=ahead, lane=lane)

        return await self._thread.read(work)

    # -- parents

    async def get_parent(self, tenant: str, parent_id: str) -> Parent | None:
        row = await self._thread.read(lambda c, _: find_parent(c, parent_id, tenant))
        return None if row is None else parent_of(row)

    async def list_parents(
        self, tenant: str, door: str, after: str = "", limit: int = 20
    ) -> tuple[list[Parent], bool]:
        rows, has_more = await self._thread.read(
            lambda c, _: queue_parents.listed(c, tenant, door, after, limit)
        )
        return [parent_of(row) for row in rows], has_more

    async def cancel_parent(self, tenant: str, parent_id: str) -> Parent | None:
        row = await self._thread.write(lambda c, now: queue_parents.cancel_parent(c, tenant, parent_id, now))
        return None if row is None else parent_of(row)

    async def claim_parent(self, owner: str, door: str) -> tuple[Parent, ParentLease] | None:
        found = await self._thread.write(
            lambda c, now: queue_parents.claim_parent(c, owner, door, now),
            lambda c, now: queue_parents.has_work(c, door, now),
        )
        return None if found is None else (parent_of(found[0]), found[1])

    async def renew_parent(self, lease: ParentLease) -> None:
        await self._thread.write(lambda c, now: queue_parents.renew_parent(c, lease, now))

    async def finish_parent(self, lease: ParentLease, state: ParentState, details: bytes) -> Parent:
        return await self._thread.write(
            lambda c, now: parent_of(queue_parents.finish_parent(c, lease, state, details, now))
        )

    # -- streams

    async def append_events(self, lease: Lease, first: int, events: Sequence[bytes]) -> None:
        stored = [
            self._content.write(data, lease.job_id, f"event-{index}")
            for index, data in enumerate(events, first)
        ]
        await self._thread.write(lambda c, _: queue_jobs.append_events(c, lease, first, stored))

    async def events_after(self, tenant: str, job_id: str, index: int, limit: int = 200) -> list[Event]:
        def work(connection: Connection, _: float) -> list[tuple[Any, ...]]:
            row = find(connection, job_id, tenant)
            query = (
                "SELECT number, fence, data FROM event WHERE seq = ? AND number > ? ORDER BY number LIMIT ?"
            )
            return [] if row is None else connection.execute(query, (row.seq, index, limit)).fetchall()

        found = await self._thread.read(work)
        return [
            Event(number, fence, self._read(data, job_id, f"event-{number}")) for number, fence, data in found
        ]

    # -- the operator's side

    async def replay(self, tenant: str, job_id: str) -> Job | None:
        def look(connection: Connection, _: float) -> tuple[bytes, bytes, bytes] | None:
            row = find(connection, job_id, tenant)
            query = "SELECT body, headers, caller FROM payload WHERE seq = ?"
            return None if row is None else connection.execute(query, (row.seq,)).get

        payload = await self._thread.read(look)
        if payload is None:
            return None
        again_id = queue_jobs.replay_id(job_id)
        content = (
            self._content.write(self._read(payload[0], job_id, "body"), again_id, "body"),
            self._content.write(self._read(payload[1], job_id, "headers"), again_id, "headers"),
            payload[2],
        )
        row = await self._thread.write(lambda c, now: queue_jobs.replay(c, job_id, again_id, content, now))
        return None if row is None else job_of(row)

    async def stats(self) -> QueueStats:
        return await self._thread.read(queue_sweep.stats)

    async def sweep(self, most: int = 200) -> Swept:
        nothing = queue_sweep.Sweeping(Swept(), [])
        sweeping = await self._thread.write(
            lambda c, now: queue_sweep.sweep(c, most, now), queue_sweep.has_due, nothing
        )
        self._content.remove(sweeping.files)
        if sweeping.swept.purged and sweeping.swept.is_all:
            await self._thread.checkpoint()  # the log still has what was deleted
        return sweeping.swept

    # -- what a job's end owes to others

    async def take_settled(self, owner: str, most: int = 200) -> list[Settled]:
        work = functools.partial(_take, queue_owed.take_settled, owner, most)
        return await self._thread.write(work, queue_owed.has_settled, [])

    async def ack_settled(self, rows: Sequence[Settled]) -> list[str]:
        return await self._thread.write(lambda c, _: queue_owed.ack_settled(c, rows))

    async def take_outbox(self, owner: str, most: int = 20) -> list[OutboxRow]:
        work = functools.partial(_take, queue_owed.take_outbox, owner, most)
        return await self._thread.write(work, queue_owed.has_news, [])

    async def outbox_delivered(self, row: OutboxRow) -> None:
        await self._thread.write(lambda c, now: queue_owed.delivered(c, row, now))

    async def outbox_failed(
        self, row: OutboxRow, retry_in_s: float | None, error: str, *, is_counted: bool = True
    ) -> None:
        def work(connection: Connection, now_time: float) -> None:
            next_time = None if retry_in_s is None else now_time + retry_in_s
            queue_owed.failed(connection, row, next_time, error, is_counted=is_counted)

        await self._thread.write(work)

    async def list_outbox(self, subject: str = "", most: int = 100) -> list[OutboxRow]:
        return await self._thread.read(lambda c, _: queue_owed.listed(c, subject, most))

    async def outbox_replay(self, row_id: str) -> bool:
        return await self._thread.write(lambda c, now: queue_owed.replay(c, row_id, now))

    async def close(self) -> None:
        await self._thread.close()

    def _read(self, stored: bytes, job_id: str, part: str) -> bytes:
        try:
            return self._content.read(stored, job_id, part)
        except StorageError as error:
            raise StoreAwayError(str(error)) from error


def _take(
    take: Callable[[Connection, str, int, float], list[_T]],
    owner: str,
    most: int,
    connection: Connection,
    now_time: float,
) -> list[_T]:
    return take(connection, owner, most, now_time)
