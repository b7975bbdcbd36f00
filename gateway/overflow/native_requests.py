"""Workers AI's queued requests: some inputs under one request id, each a job, and what became of each.

Owns the door's record of them and the form of what is told while they wait and when they have ended. Knows the native
form through `gateway.workers_ai`; refuses to know HTTP.
"""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw

from gateway.http_rules import Refusal
from gateway.overflow.batch_output import add_usage
from gateway.overflow.endpoints import is_endpoint
from gateway.overflow.job import Job, JobClass, JobFilter, NewParent, Parent, Result
from gateway.overflow.store import QueueStore
from gateway.overflow.submit import Submitter, Wish, idempotency_of
from gateway.workers_ai.answers import UnreadableAnswerError, result_of
from gateway.workers_ai.envelope import INTERNAL, OUT_OF_CAPACITY, encode, error_of
from gateway.workers_ai.forms import Form, Translated, translate
from policies.exchange import Caller
from policies.verdict import Denial

DOOR: Final = "workers_ai"
MOST_REQUESTS: Final = 1000
_PAGE: Final = 100
_MAX_REFERENCE: Final = 512
_LEAST_DEADLINE_S, _MOST_DEADLINE_S = 60.0, 604_800.0
_CLASSES: Final[Mapping[str, JobClass]] = {"flex": "flex", "batch": "batch"}

_objects = msgspec.json.Decoder(list[dict[str, Raw]]).decode
_decode_form = msgspec.json.Decoder(Form).decode
# What an item is said to be while its request is open.
_ITEM_STATES: Final = {"staged": "queued", "cancelling": "running"}


class NativeOptions(msgspec.Struct):
    """`options` of a native request. Only what the queue reads of it; `rejectIfBusy` is read elsewhere."""

    background: bool = False
    webhook_url: str = msgspec.field(default="", name="webhookUrl")
    webhook_format: str | None = msgspec.field(default=None, name="webhookFormat")
    priority: str = "flex"
    deadline_s: float | None = None


class NativeRecord(msgspec.Struct, frozen=True):
    """`Parent.details`."""

    model: str


_decode_options = msgspec.json.Decoder(NativeOptions).decode
_decode_record = msgspec.json.Decoder(NativeRecord).decode


def read_options(fields: Mapping[str, Raw]) -> NativeOptions:
    """Refusal when they contradict each other, or are none."""
    try:
        options = _decode_options(fields.get("options", b"{}"))
    except msgspec.DecodeError as error:
        raise Refusal(400, "invalid_type", f"`options`: {error}", "options") from error
    if options.webhook_url and not options.background:
        raise Refusal(400, "invalid_value", "`options.webhookUrl` needs `options.background`", "options")
    if options.webhook_format is not None and not options.webhook_url:
        raise Refusal(400, "invalid_value", "`options.webhookFormat` needs `options.webhookUrl`", "options")
    if options.priority not in _CLASSES:
        raise Refusal(400, "invalid_value", "`options.priority` is `flex` or `batch`", "options")
    deadline_s = options.deadline_s
    if deadline_s is not None and not _LEAST_DEADLINE_S <= deadline_s <= _MOST_DEADLINE_S:
        raise Refusal(
            400, "invalid_value", "`options.deadline_s` is a time from 60 to 604800 seconds", "options"
        )
    return options


class NativeRequests:
    """The door. One per worker."""

    def __init__(self, store: QueueStore, submitter: Submitter) -> None:
        self._store = store
        self._submitter = submitter

    async def submit(
        self, caller: Caller, model: str, fields: Mapping[str, Raw], *, idempotency_key: bytes, webhook: str
    ) -> Parent | Denial:
        """All of `requests`, or the one input there is. Refusal when one of them cannot be read; nothing is queued then."""
        options = read_options(fields)
        inputs = _inputs(fields)
        wishes = [
            Wish(
                caller=caller,
                path=translated.dialect.path,
                body=translated.body,
                door=DOOR,
                job_class=_CLASSES[options.priority],
                expires_in_s=options.deadline_s,
                reference=reference,
                details=encode(translated.form),
            )
            for translated, reference in (_translated(model, each) for each in inputs)
        ]
        parent = NewParent(
            id=_new_request_id(),
            tenant=caller.tenant,
            key_id=caller.key_id,
            door=DOOR,
            is_finalized=False,
            expires_in_s=options.deadline_s or _MOST_DEADLINE_S,
            webhook=webhook,
            # Whoever names a URL for this one request is told once, how it ended.
            announces=" ".join(name for name in webhook.split() if is_endpoint(name)),
            details=encode(NativeRecord(model)),
            idempotency=idempotency_of(caller, f"/ai/run/{model}", idempotency_key, encode(fields)),
        )
        outcome = await self._submitter.submit_all(parent, wishes)
        if isinstance(outcome, Parent):
            return outcome
        return next(denial for denial in outcome if denial is not None)

    async def find(self, tenant: str, request_id: str) -> Parent | None:
        parent = await self._store.get_parent(tenant, request_id)
        return parent if parent is not None and parent.door == DOOR else None

    async def page(self, tenant: str, after: str, limit: int) -> tuple[list[Parent], bool]:
        return await self._store.list_parents(tenant, DOOR, after, limit)

    async def cancel(self, tenant: str, request_id: str) -> Parent | None:
        """None: there is none."""
        if await self.find(tenant, request_id) is None:
            return None
        return await self._store.cancel_parent(tenant, request_id)

    async def items(self, parent: Parent) -> list[dict[str, Any]]:
        """Each input's state, without its answer."""
        return [
            {
                "id": job.position,
                "status": _ITEM_STATES.get(job.state, job.state),
                "external_reference": job.reference or None,
            }
            async for page in self._pages(parent)
            for job in page
        ]

    async def responses(self, parent: Parent) -> AsyncIterator[bytes]:
        """The answers of a request that has ended, as the members of `result`, piece by piece."""
        usage: dict[str, Any] = {}
        yield b'"responses":['
        async for page in self._pages(parent):
            for job in page:
                result = await self._store.result(job.tenant, job.id) if job.status else None
                add_usage(usage, job.usage)
                yield (b"," if job.position else b"") + encode(_response(job, result))
        total = {
            "prompt_tokens": usage.get("input_tokens", 0),
            "completion_tokens": usage.get("output_tokens", 0),
            "total_tokens": usage.get("total_tokens", 0),
        }
        yield b'],"usage":' + encode(total)

    async def _pages(self, parent: Parent) -> AsyncIterator[Sequence[Job]]:
        cursor: str | None = None
        while True:
            page = await self._store.list_jobs(
                JobFilter(tenant=parent.tenant, parent=parent.id), cursor, _PAGE
            )
            yield page.jobs
            cursor = page.cursor
            if cursor is None:
                return


def standing(parent: Parent) -> dict[str, Any]:
    """What is told of a request that has not ended: Cloudflare's fields, and how far it is."""
    waiting = parent.counts.get("queued", 0) + parent.counts.get("staged", 0)
    return {
        "status": "queued" if waiting == parent.total else "running",
        **summary(parent),
    }


def summary(parent: Parent) -> dict[str, Any]:
    """One line of the list."""
    ended = parent.counts.get("succeeded", 0)
    return {
        "request_id": parent.id,
        "model": _decode_record(parent.details).model,
        "created_at": int(parent.created_time),
        "expires_at": int(parent.expires_time),
        "counts": {
            "total": parent.total,
            "succeeded": ended,
            "failed": sum(parent.counts.get(s, 0) for s in ("failed", "dead", "expired", "cancelled")),
        },
    }


def _response(job: Job, result: Result | None) -> dict[str, Any]:
    told: dict[str, Any] = {"id": job.position}
    error: dict[str, Any] | None = None
    if result is not None and result.status < 400:
        try:
            told["result"] = result_of(_decode_form(job.details), result.body)
        except UnreadableAnswerError:
            error = {
                "code": INTERNAL,
                "message": "the model's upstream answered in a form that is not its API's",
            }
    elif result is not None:
        _, error = error_of(result.status, result.body)
    else:
        code = OUT_OF_CAPACITY if job.state in {"dead", "expired"} else INTERNAL
        error = {"code": code, "message": job.error or f"the request was {job.state}"}
    told["success"] = error is None
    if error is not None:
        told["error"] = error
    told["external_reference"] = job.reference or None
    return told


def _inputs(fields: Mapping[str, Raw]) -> list[dict[str, Raw]]:
    if "requests" not in fields:
        return [dict(fields)]
    try:
        inputs = _objects(fields["requests"])
    except msgspec.DecodeError as error:
        raise Refusal(400, "invalid_type", "`requests` must be a list of inputs", "requests") from error
    if not 1 <= len(inputs) <= MOST_REQUESTS:
        message = f"`requests` takes 1 to {MOST_REQUESTS} inputs; /v1/batches takes more"
        raise Refusal(400, "invalid_value", message, "requests")
    return inputs


def _translated(model: str, fields: dict[str, Raw]) -> tuple[Translated, str]:
    reference = ""
    if "external_reference" in fields:
        try:
            reference = msgspec.json.decode(fields["external_reference"], type=str | None) or ""
        except msgspec.DecodeError as error:
            message = "`external_reference` must be a string"
            raise Refusal(400, "invalid_type", message, "external_reference") from error
        if len(reference) > _MAX_REFERENCE:
            message = f"`external_reference` may have {_MAX_REFERENCE} characters"
            raise Refusal(400, "invalid_value", message, "external_reference")
    if bytes(fields.get("stream", b"")) == b"true":
        raise Refusal(400, "invalid_value", "a queued request cannot be streamed", "stream")
    return translate(model, fields), reference


def _new_request_id() -> str:
    """128 random bits, written as a UUID is."""
    text = secrets.token_hex(16)
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
