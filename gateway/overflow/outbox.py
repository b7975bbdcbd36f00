"""The queue's news on their way to receivers: the outbox of its store, and what each row says as its API's event.

A row was written in the transaction that ended its job or parent. Any process may deliver it: whoever takes it has it
for a while. Events are thin: which one it is, so that its receiver asks for it with its own key.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, Final

import msgspec
import orjson

from gateway.overflow.endpoints import EVENTS, Endpoints
from gateway.overflow.job import Job, JobFilter, OutboxRow, Parent
from gateway.overflow.store import QueueStore
from gateway.webhooks import Receiver

_TOLD_ERROR_CHARACTERS: Final = 500


class QueuedMessage(msgspec.Struct, frozen=True):
    """A row of the outbox, as `gateway.webhook_delivery` wants it."""

    row: OutboxRow

    @property
    def message_id(self) -> str:
        return self.row.id

    @property
    def receiver(self) -> str:
        return f"{self.row.tenant} {self.row.webhook}"

    @property
    def attempts(self) -> int:
        return self.row.attempts


class QueueOutbox:
    """An Outbox over the store's. `owner` is who leases rows."""

    def __init__(
        self, store: QueueStore, endpoints: Endpoints, owner: str, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._endpoints = endpoints
        self._owner = owner
        self._clock = clock

    async def take(self, most: int, now_time: float) -> Sequence[QueuedMessage]:
        del now_time  # the store has its own
        return [QueuedMessage(row) for row in await self._store.take_outbox(self._owner, most)]

    async def opened(self, message: QueuedMessage) -> tuple[Receiver, bytes] | None:
        event = await self._event(message.row)
        if event is None:
            return None
        receiver = await self._endpoints.receiver(message.row.tenant, message.row.webhook, event["type"])
        return None if receiver is None else (receiver, orjson.dumps(event))

    async def end(self, message: QueuedMessage, error: str) -> None:
        if error:
            await self._store.outbox_failed(message.row, None, error)
        else:
            await self._store.outbox_delivered(message.row)

    async def retry(self, message: QueuedMessage, next_time: float, error: str) -> None:
        await self._store.outbox_failed(message.row, max(0.0, next_time - self._clock()), error)

    async def put_off(self, message: QueuedMessage, next_time: float) -> None:
        retry_in_s = max(0.0, next_time - self._clock())
        await self._store.outbox_failed(message.row, retry_in_s, message.row.error, is_counted=False)

    async def refused(self, message: QueuedMessage) -> None:
        await self._endpoints.disable(message.row.tenant, message.row.webhook, "it answered 410")

    async def _event(self, row: OutboxRow) -> dict[str, Any] | None:
        """None: nothing is told of this, or what it is about is forgotten."""
        subject: Job | Parent | None
        if row.is_parent:
            subject = await self._store.get_parent(row.tenant, row.subject)
        else:
            subject = await self._store.get(row.tenant, row.subject)
        state = row.state
        if row.door == "response" and state == "succeeded" and await self._stopped_early(row):
            state = "incomplete"
        kind = EVENTS[row.door].get(state)
        if kind is None:
            return None
        if row.door == "workers_ai":
            return _workers_ai(kind, row, subject, await self._model_of(subject))
        data: dict[str, Any] = {"id": row.subject}
        if isinstance(subject, Job) and subject.reference:
            data["reference"] = subject.reference
        return {
            "id": "evt_" + row.id.partition("_")[2],
            "object": "event",
            "type": kind,
            "created_at": int(row.created_time),
            "data": data,
        }

    async def _model_of(self, subject: Job | Parent | None) -> str:
        """All of a parent's children have one."""
        if isinstance(subject, Parent):
            page = await self._store.list_jobs(JobFilter(tenant=subject.tenant, parent=subject.id), limit=1)
            subject = page.jobs[0] if page.jobs else None
        return "" if subject is None else subject.model

    async def _stopped_early(self, row: OutboxRow) -> bool:
        result = await self._store.result(row.tenant, row.subject)
        if result is None:
            return False
        try:
            return bool(msgspec.json.decode(result.body, type=_Answer).status == "incomplete")
        except msgspec.DecodeError:
            return False


class _Answer(msgspec.Struct):
    status: str = ""


def _workers_ai(kind: str, row: OutboxRow, subject: Job | Parent | None, model: str) -> dict[str, Any]:
    """As Cloudflare's event subscriptions say it. The account is the tenant's name, for here there are no others."""
    payload: dict[str, Any] = {"requestId": row.subject}
    if kind.endswith("failed"):
        error = subject.error if isinstance(subject, Job) else ""
        payload["message"] = error[:_TOLD_ERROR_CHARACTERS] or f"the batch has {row.state}"
        payload["internalCode"] = 3007 if row.state == "expired" else 3040 if row.state == "dead" else 5004
        payload["httpCode"] = (isinstance(subject, Job) and subject.status) or 500
    told = datetime.fromtimestamp(row.created_time, UTC).isoformat(timespec="milliseconds")
    return {
        "type": kind,
        "source": {"type": "workersAi.model", "modelName": model},
        "payload": payload,
        "metadata": {
            "accountId": row.tenant,
            "eventSubscriptionId": row.webhook if row.webhook.startswith("we_") else "",
            "eventSchemaVersion": 1,
            "eventTimestamp": told.replace("+00:00", "Z"),
        },
    }
