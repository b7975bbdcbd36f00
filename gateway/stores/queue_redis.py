"""The queue of several nodes, in Redis 6.2 or newer or Valkey: one script a call, at the server's time.

A QueueStore. What a 202 means here: the job is in Redis (as durable as its `appendfsync`, and on `replicas` others where
asked for) and synced in this node's journal; what Redis loses, the nodes tell it again (`gateway.stores.queue_node`). A job's end is
in the journal before Redis is told of it. Events of a stream are in Redis only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from gateway.limit_storage import connect
from gateway.overflow.job import (
    FINAL,
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
from gateway.overflow.store import LeaseLostError, StoreAwayError
from gateway.redis_config import RedisConfig
from gateway.stores.queue_content import Content
from gateway.stores.queue_jobs import Answer, replay_id
from gateway.stores.queue_journal import Journal
from gateway.stores.queue_node import QueueNode
from gateway.stores.queue_records import children_of, ending_of, opening_of, promise_of, step_of
from gateway.stores.queue_reply import (
    NEWS_FIELDS,
    end_binary,
    end_words,
    job_binary,
    job_row,
    lane_from,
    lease_words,
    news_from,
    parent_from,
    payload_of,
    plain_job,
    plain_limits,
    plain_parent,
    stats_from,
)
from gateway.stores.queue_schema import JobRow, job_of
from gateway.stores.sqlite import StorageError

_TIMEOUT_S: Final = 5.0  # a thousand children at once take a while
_NO_LEDGER: Final = (b"", b"", b"", b"")


class RedisQueueStore:
    """One per process. A result in a folder is read by every node only where the folder is shared."""

    def __init__(self, node: QueueNode, content: Content | None = None) -> None:
        self._node = node
        self._content = content or Content()
        self._leased: dict[str, JobRow] = {}  # what was claimed here, for the journal

    # -- handing in

    async def submit(self, job: NewJob, limits: TenantLimits) -> Submitted:
        (stored,) = await self._content.stored([job])
        arguments = {"job": plain_job(job), "limits": plain_limits(limits)}
        is_new, found = await self._node.ask("submit", arguments, job_binary(stored), is_promise=True)
        row = job_row(found)
        if row.state not in FINAL:
            # Also one that was there before: its first 202 may never have been sent.
            await self._node.journal.put([promise_of(row, job_binary(stored), self._node.epoch)])
        return Submitted(job_of(row), bool(is_new))

    async def submit_all(
        self, parent: NewParent, jobs: Sequence[NewJob], limits: TenantLimits
    ) -> tuple[Parent, bool]:
        stored = await self._content.stored(jobs)
        arguments = {
            "parent": plain_parent(parent),
            "jobs": [plain_job(each) for each in jobs],
            "limits": plain_limits(limits),
        }
        binary = [parent.details, *(part for each in stored for part in job_binary(each))]
        is_new, values = await self._node.ask("submit_all", arguments, binary, is_promise=True)
        found = parent_from(values)
        if is_new:
            promises = children_of(found, 0, stored, self._node.epoch)
            await self._node.journal.put(promises, [opening_of(parent, found, self._node.epoch)])
        return found, bool(is_new)

    async def open_parent(self, parent: NewParent, owner: str) -> tuple[Parent, ParentLease | None]:
        arguments = {"parent": plain_parent(parent), "owner": owner}
        is_new, values = await self._node.ask("open_parent", arguments, [parent.details], is_promise=True)
        found = parent_from(values)
        if not is_new:
            return found, None
        await self._node.journal.put(steps=[opening_of(parent, found, self._node.epoch)])
        return found, ParentLease(found.id, found.fence, owner)

    async def append_children(
        self, lease: ParentLease, first: int, jobs: Sequence[NewJob], limits: TenantLimits
    ) -> Parent:
        stored = await self._content.stored(jobs)
        arguments = {
            "lease": lease_words(lease),
            "first": first,
            "jobs": [plain_job(each) for each in jobs],
            "limits": plain_limits(limits),
        }
        binary = [part for each in stored for part in job_binary(each)]
        (values,) = await self._node.ask("append_children", arguments, binary, is_promise=True)
        found = parent_from(values)
        await self._node.journal.put(children_of(found, first, stored, self._node.epoch))
        return found

    async def release_parent(self, lease: ParentLease, most: int = 500) -> int:
        (left,) = await self._node.ask("release_parent", {"lease": lease_words(lease), "most": most})
        if not left:
            found = await self.get_parent("", lease.parent_id)
            if found is not None:
                await self._step(found, "release", {"id": found.id, "total": found.total})
        return int(left)

    async def fail_parent(self, lease: ParentLease, details: bytes) -> Parent:
        (values,) = await self._node.ask("fail_parent", {"lease": lease_words(lease)}, [details])
        return await self._parent_ended(parent_from(values))

    # -- running

    async def claim(self, lane: str, owner: str, *, is_alone: bool = False) -> Claimed | None:
        answer = await self._node.ask("claim", {"lane": lane, "owner": owner, "is_alone": is_alone})
        if not answer:
            return None
        row, payload = job_row(answer[0]), payload_of(answer[1])
        self._leased[row.id] = row
        return Claimed(
            job=job_of(row),
            lease=Lease(row.id, row.fence, owner),
            body=self._read(payload[0], row.id, "body"),
            headers=self._read(payload[1], row.id, "headers"),
            caller=payload[2],
            reservation=payload[3],
            carried=payload[4],
            is_solitary=is_alone,
        )

    async def renew(self, leases: Sequence[Lease]) -> dict[str, State]:
        if not leases:
            return {}
        known = set(self._leased)
        (found,) = await self._node.ask("renew", {"leases": [lease_words(each) for each in leases]})
        states: dict[str, State] = {
            job.decode(): state.decode() for job, state in zip(found[::2], found[1::2], strict=True)
        }
        for job_id in known - states.keys():  # lost or given up; one that ends here all the same is asked for
            self._leased.pop(job_id, None)
        return states

    async def finish(self, lease: Lease, outcome: Outcome) -> Job:
        answer = await self._answer(lease, outcome.result)
        arguments = end_words(lease, answer, outcome.error, outcome.units, outcome.cost_nanousd)
        arguments["state"] = outcome.state
        binary = end_binary(answer, outcome.ledger_row, outcome.usage)
        row = self._leased.get(lease.job_id) or await self._leased_elsewhere(lease)
        await self._node.journal.put_end(ending_of(row, lease, (arguments, binary), self._node.epoch))
        is_kept = True  # perhaps, unless it says otherwise
        try:
            is_now, values = await self._node.ask("finish", arguments, binary)
            is_kept = bool(is_now)
        except LeaseLostError:
            is_kept = False
            await self._close_end(lease, is_taken=False)
            raise
        finally:
            if not is_kept and answer is not None:
                self._content.remove([answer.file])
        await self._close_end(lease, is_taken=True)
        return job_of(job_row(values))

    async def fail(self, lease: Lease, failure: Failure) -> Job:
        answer = await self._answer(lease, failure.result)
        arguments = end_words(lease, answer, failure.error, failure.units, failure.cost_nanousd)
        arguments |= {
            "counted": int(failure.is_counted),
            "retry_in_s": failure.retry_in_s,
            "is_carried": failure.carried is not None,
        }
        binary = end_binary(answer, failure.ledger_row, b"")
        is_kept, values = await self._node.ask("fail", arguments, [*binary, failure.carried or b""])
        if not is_kept and answer is not None:
            self._content.remove([answer.file])
        row = job_row(values)
        await self._ended(row, lease, arguments | {"state": row.state}, binary)
        return job_of(row)

    async def release(self, leases: Sequence[Lease], retry_in_s: float = 0.0) -> list[str]:
        arguments = {"leases": [lease_words(each) for each in leases], "retry_in_s": retry_in_s}
        (found,) = await self._node.ask("release", arguments)
        for lease in leases:
            self._leased.pop(lease.job_id, None)
        return [each.decode() for each in found]

    async def owner_died(self, owner: str) -> int:
        (count,) = await self._node.ask("owner_died", {"owner": owner})
        return int(count)

    # -- its caller's side

    async def cancel(self, tenant: str, job_id: str) -> Job | None:
        answer = await self._node.ask("cancel", {"tenant": tenant, "id": job_id})
        if not answer:
            return None
        row = job_row(answer[0])
        if row.state == "cancelled":
            lease = Lease(row.id, row.fence, "")
            arguments = end_words(lease, None, row.error, 0, row.cost_nanousd) | {"state": row.state}
            await self._ended(row, lease, arguments, _NO_LEDGER)
        return job_of(row)

    async def get(self, tenant: str, job_id: str) -> Job | None:
        (found,) = await self._node.ask("get", {"tenant": tenant, "id": job_id}) or (None,)
        return None if found is None else job_of(job_row(found))

    async def result(self, tenant: str, job_id: str) -> Result | None:
        found = await self._node.ask("result", {"tenant": tenant, "id": job_id})
        if not found:
            return None
        status, size, headers, body, file = found
        try:
            return await self._content.result(job_id, Answer(status, size, headers, body, file.decode()))
        except StorageError as error:
            raise StoreAwayError(str(error)) from error

    async def purge(self, tenant: str, job_id: str) -> Job | None:
        answer = await self._node.ask("purge", {"tenant": tenant, "id": job_id})
        if not answer:
            return None
        values, files = answer
        self._content.remove([each.decode() for each in files])
        row = job_row(values)
        if row.is_purged:
            await self._node.journal.purge([row.id])
        return job_of(row)

    async def list_jobs(self, where: JobFilter, cursor: str | None = None, limit: int = 20) -> JobPage:
        is_ours = cursor is not None and cursor.isdecimal()
        arguments: dict[str, Any] = {
            "tenant": where.tenant,
            "parent": where.parent,
            "lane": where.lane,
            "doors": dict.fromkeys(where.doors, True) or None,
            "states": dict.fromkeys(where.states, True) or None,
            "limit": limit,
            "cursor": cursor if is_ours else None,
        }
        after, found = await self._node.ask("list", arguments)
        return JobPage([job_of(job_row(each)) for each in found], after.decode() or None)

    async def standing(self, tenant: str, job_id: str) -> Standing | None:
        found = await self._node.ask("standing", {"tenant": tenant, "id": job_id})
        if not found:
            return None
        state, ahead, lane = found
        return Standing(state=state.decode(), ahead=ahead, lane=lane_from(lane))

    # -- parents

    async def get_parent(self, tenant: str, parent_id: str) -> Parent | None:
        (found,) = await self._node.ask("get_parent", {"tenant": tenant, "id": parent_id}) or (None,)
        return None if found is None else parent_from(found)

    async def list_parents(
        self, tenant: str, door: str, after: str = "", limit: int = 20
    ) -> tuple[list[Parent], bool]:
        arguments = {"tenant": tenant, "door": door, "after": after, "limit": limit}
        (found,) = await self._node.ask("list_parents", arguments)
        parents = [parent_from(each) for each in found]
        return parents[:limit], len(parents) > limit

    async def cancel_parent(self, tenant: str, parent_id: str) -> Parent | None:
        answer = await self._node.ask("cancel_parent", {"tenant": tenant, "id": parent_id})
        if not answer:
            return None
        found = parent_from(answer[0])
        if found.cancelled_time is not None and not found.is_final:
            await self._step(found, "cancel", {"tenant": "", "id": found.id})
        return found

    async def claim_parent(self, owner: str, door: str) -> tuple[Parent, ParentLease] | None:
        answer = await self._node.ask("claim_parent", {"owner": owner, "door": door})
        if not answer:
            return None
        found = parent_from(answer[0])
        return found, ParentLease(found.id, found.fence, owner)

    async def renew_parent(self, lease: ParentLease) -> None:
        await self._node.ask("renew_parent", {"lease": lease_words(lease)})

    async def finish_parent(self, lease: ParentLease, state: ParentState, details: bytes) -> Parent:
        (values,) = await self._node.ask(
            "finish_parent", {"lease": lease_words(lease), "state": state}, [details]
        )
        return await self._parent_ended(parent_from(values))

    # -- streams

    async def append_events(self, lease: Lease, first: int, events: Sequence[bytes]) -> None:
        stored = [
            self._content.write(data, lease.job_id, f"event-{index}")
            for index, data in enumerate(events, first)
        ]
        arguments = {"lease": lease_words(lease), "first": first, "count": len(stored)}
        await self._node.ask("append_events", arguments, stored)

    async def events_after(self, tenant: str, job_id: str, index: int, limit: int = 200) -> list[Event]:
        arguments = {"tenant": tenant, "id": job_id, "index": index, "limit": limit}
        (found,) = await self._node.ask("events", arguments)
        events = []
        for number, each in enumerate(found, index + 1):
            fence, _, data = each.partition(b":")
            events.append(Event(number, int(fence), self._read(data, job_id, f"event-{number}")))
        return events

    # -- the operator's side

    async def replay(self, tenant: str, job_id: str) -> Job | None:
        (found,) = await self._node.ask("payload", {"tenant": tenant, "id": job_id}) or (None,)
        payload = [] if found is None else payload_of(found)
        if not payload:
            return None
        again_id = replay_id(job_id)
        body = self._content.write(self._read(payload[0], job_id, "body"), again_id, "body")
        headers = self._content.write(self._read(payload[1], job_id, "headers"), again_id, "headers")
        before = await self.get(tenant, job_id)
        binary = (body, headers, payload[2], b"", b"" if before is None else before.details)
        answer = await self._node.ask("replay", {"id": job_id, "again": again_id}, binary, is_promise=True)
        if not answer:
            return None
        is_new, values = answer
        row = job_row(values)
        if is_new:
            await self._node.journal.put([promise_of(row, binary, self._node.epoch)])
        return job_of(row)

    async def stats(self) -> QueueStats:
        return stats_from(await self._node.ask("stats", {}))

    async def sweep(self, most: int = 200) -> Swept:
        await self._node.tend()
        *counts, is_all, files = await self._node.ask("sweep", {"most": most})
        self._content.remove([each.decode() for each in files])
        names = ("requeued", "dead", "expired", "cancelled", "purged", "forgotten")
        return Swept(**dict(zip(names, counts, strict=True)), is_all=bool(is_all))

    # -- what a job's end owes to others

    async def take_settled(self, owner: str, most: int = 200) -> list[Settled]:
        (found,) = await self._node.ask("take_settled", {"owner": owner, "most": most})
        return [
            Settled(
                job_id=job_id.decode(),
                state=state.decode(),
                ledger_row=row,
                reservation=reservation,
                fence=fence,
            )
            for job_id, state, row, reservation, fence in found
        ]

    async def ack_settled(self, rows: Sequence[Settled]) -> list[str]:
        (found,) = await self._node.ask("ack_settled", {"rows": [(row.job_id, row.fence) for row in rows]})
        return [each.decode() for each in found]

    async def take_outbox(self, owner: str, most: int = 20) -> list[OutboxRow]:
        arguments = {"owner": owner, "most": most, "fields": NEWS_FIELDS}
        (found,) = await self._node.ask("take_news", arguments)
        return [news_from(each) for each in found]

    async def outbox_delivered(self, row: OutboxRow) -> None:
        await self._node.ask("end_news", {"id": row.id, "fence": row.fence, "is_delivered": True})

    async def outbox_failed(
        self, row: OutboxRow, retry_in_s: float | None, error: str, *, is_counted: bool = True
    ) -> None:
        arguments = {
            "id": row.id,
            "fence": row.fence,
            "retry_in_s": retry_in_s,
            "error": error,
            "counted": int(is_counted),
        }
        await self._node.ask("end_news", arguments)

    async def list_outbox(self, subject: str = "", most: int = 100) -> list[OutboxRow]:
        arguments = {"subject": subject, "most": most, "fields": NEWS_FIELDS}
        (found,) = await self._node.ask("list_news", arguments)
        return [news_from(each) for each in found]

    async def outbox_replay(self, row_id: str) -> bool:
        (is_known,) = await self._node.ask("replay_news", {"id": row_id})
        return bool(is_known)

    async def close(self) -> None:
        await self._node.close()

    # -- the journal's records

    async def _step(
        self, parent: Parent, name: str, arguments: dict[str, Any], binary: Sequence[bytes] = ()
    ) -> None:
        step = step_of(parent, name, (arguments, binary), self._node.epoch)
        await self._node.journal.put(steps=[step])

    async def _parent_ended(self, parent: Parent) -> Parent:
        await self._step(parent, "end", {"id": parent.id, "state": parent.state}, [parent.details])
        return parent

    async def _ended(
        self, row: JobRow, lease: Lease, arguments: dict[str, Any], binary: Sequence[bytes]
    ) -> None:
        """It has ended otherwise than by a finish: its node remembers that, too."""
        if row.state not in FINAL:
            self._leased.pop(row.id, None)
            return
        ending = ending_of(row, lease, (arguments, binary), self._node.epoch)
        await self._node.journal.put_end(ending)
        await self._close_end(lease, is_taken=True)

    async def _close_end(self, lease: Lease, *, is_taken: bool) -> None:
        self._leased.pop(lease.job_id, None)
        await self._node.journal.close_end(lease.job_id, lease.fence, lease.owner, is_taken=is_taken)

    async def _leased_elsewhere(self, lease: Lease) -> JobRow:
        (found,) = await self._node.ask("get", {"tenant": "", "id": lease.job_id}) or (None,)
        if found is None:
            raise LeaseLostError(lease.job_id)
        return job_row(found)

    async def _answer(self, lease: Lease, result: Result | None) -> Answer | None:
        try:
            return await self._content.answer(lease, result)
        except StorageError as error:
            raise StoreAwayError(str(error)) from error

    def _read(self, stored: bytes, job_id: str, part: str) -> bytes:
        try:
            return self._content.read(stored, job_id, part)
        except StorageError as error:
            raise StoreAwayError(str(error)) from error


def open_queue(
    settings: RedisConfig, storage: Path, content: Content, *, replicas: int = 0
) -> RedisQueueStore:
    """StorageError when the journal cannot be used; nothing is sent yet."""
    node = QueueNode(connect(settings, _TIMEOUT_S), Journal(storage), replicas=replicas)
    return RedisQueueStore(node, content)
