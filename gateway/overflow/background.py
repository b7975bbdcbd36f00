"""Responses with `background: true`: a job that its caller polls, cancels, and whose stream it may leave and take up again.

Owns the response object while there is no answer yet, and when there will be none; an answer is the upstream's own but
for its id, which is the job's. Sequence numbers of a stream follow from its journal: 0 and 1 are ours (created, queued), an
event of the journal has its index, so that any worker gives the same numbers at every reading. Knows no HTTP.
"""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from math import inf
from typing import Any, Final

import msgspec
from msgspec import Raw

from backends.sse import decode
from gateway.http_rules import Refusal
from gateway.idempotency import HEADER
from gateway.overflow.job import Job, Result, new_id
from gateway.overflow.stand_in import read_head_event
from gateway.overflow.store import QueueStore
from gateway.overflow.submit import Submitter, Wish
from gateway.overflow.watching import Watch
from policies.exchange import Caller
from policies.verdict import Denial

DOOR: Final = "response"
PREFIX: Final = "resp_"
_CANCEL_S: Final = 30.0  # a run is told to stop at its next renewal, at the latest
_CREATED, _QUEUED = 0, 1
_TERMINAL: Final = frozenset({"response.completed", "response.incomplete", "response.failed", "error"})
# Told of a response before there is an answer; of the request no more is kept beside its body.
_ECHOED: Final[Mapping[str, Any]] = {
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "temperature": None,
    "top_p": None,
    "truncation": "disabled",
}
_STATUS: Final = {
    "staged": "queued",
    "queued": "queued",
    "running": "in_progress",
    "cancelling": "in_progress",
}

_encode = msgspec.json.Encoder().encode
_fields = msgspec.json.Decoder(dict[str, Raw]).decode
_text = msgspec.json.Decoder(str).decode


class _Error(msgspec.Struct):
    message: str = ""


class _Body(msgspec.Struct):
    error: _Error | str | None = None


_read_error = msgspec.json.Decoder(_Body).decode


class Numbered(msgspec.Struct, frozen=True):
    """One event of a stream as it is sent, or silence (`data` empty)."""

    number: int
    data: bytes = b""


SILENCE: Final = Numbered(-1)


class Background:
    """The door. One per worker."""

    def __init__(
        self,
        store: QueueStore,
        submitter: Submitter,
        watch: Watch,
        on_new: Callable[[str], None],
        on_cancel: Callable[[str], None],
    ) -> None:
        """`on_new` is told a new job's lane, `on_cancel` the id of one to be stopped: what runs here hears it at once."""
        self._store = store
        self._submitter = submitter
        self._watch = watch
        self._on_new = on_new
        self._on_cancel = on_cancel

    async def create(
        self,
        caller: Caller,
        values: Mapping[str, Raw],
        headers: Sequence[tuple[bytes, bytes]],
        *,
        is_stream: bool,
        webhook: str,
    ) -> Job | Denial:
        """Committed when it returns. Refusal when the request contradicts itself."""
        if bytes(values.get("store", b"")) == b"false":
            raise Refusal(
                400, "invalid_value", "`background` needs `store`: leave it out, or say true", "store"
            )
        sent = {name: value for name, value in values.items() if name != "background"}
        await self._find_previous(caller, sent)
        echoed = {name: values[name] for name in _ECHOED if name in values}
        job = await self._submitter.submit(
            Wish(
                caller=caller,
                path="/v1/responses",
                body=_encode(sent),
                headers=headers,
                door=DOOR,
                is_stream=is_stream,
                webhook=webhook,
                idempotency_key=next((value for name, value in headers if name == HEADER), b""),
                details=_encode(echoed),
                job_id=new_id("resp"),
            )
        )
        if isinstance(job, Job):
            self._on_new(job.lane)
        return job

    async def find(self, tenant: str, response_id: str) -> Job | None:
        """None: there is none, or not any more."""
        if not response_id.startswith(PREFIX):
            return None
        job = await self._store.get(tenant, response_id)
        return job if job is not None and job.door == DOOR and not job.is_purged else None

    async def told(self, job: Job) -> bytes:
        """The response object as it stands."""
        result = await self._store.result(job.tenant, job.id) if job.status else None
        return response_of(job, result)

    async def cancel(self, job: Job) -> Job:
        """As it stands when that has taken effect; one that has ended stays as it is."""
        cancelled = await self._store.cancel(job.tenant, job.id)
        if cancelled is None or cancelled.is_final:
            return cancelled or job
        self._on_cancel(job.id)
        return await self._watch.final(job.tenant, job.id, time.monotonic() + _CANCEL_S) or cancelled

    async def delete(self, job: Job) -> None:
        """Ended first, if it has not; what was kept of it is gone when this returns."""
        job = await self.cancel(job)
        await self._store.purge(job.tenant, job.id)

    async def events(self, job: Job, after: int) -> AsyncIterator[Numbered]:
        """Those with higher numbers, as they come, up to the one that ends the response. SILENCE now and then."""
        if after < _CREATED:
            yield _event(_CREATED, "response.created", {"response": _waiting(job, "queued")})
        if after < _QUEUED:
            yield _event(_QUEUED, "response.queued", {"response": _waiting(job, "queued")})
        last, is_over = -1, False
        # Number 1 stands for the upstream's own word that the response was created, which has been said.
        journal = self._watch.events(job.tenant, job.id, max(after, 0), inf)
        async with contextlib.aclosing(journal):
            async for event in journal:
                if event is None:
                    yield SILENCE
                    continue
                if read_head_event(event.data) is not None:
                    continue
                kind, data = _renumbered(job, event.data, event.index)
                if not data or event.index <= after or (event.index == 1 and kind == "response.created"):
                    continue
                yield Numbered(event.index, data)
                last, is_over = event.index, kind in _TERMINAL
        if not is_over:
            number = await self._end_number(job, last, after)
            ended = await self._store.get(job.tenant, job.id)
            if number > after and ended is not None and ended.is_final:
                # Nobody told the end of it: it was cancelled, expired, or could not be carried out.
                yield _event(number, "response.failed", {"response": Raw(await self.told(ended))})

    async def _end_number(self, job: Job, last: int, after: int) -> int:
        """The number that an end of ours has; -1: its reader has had the end."""
        if last < 0 and after > _QUEUED:
            before = await self._store.events_after(job.tenant, job.id, after - 1, 1)
            if not before or _renumbered(job, before[0].data, after)[0] in _TERMINAL:
                return -1
        return max(last, after, _QUEUED) + 1

    async def _find_previous(self, caller: Caller, sent: dict[str, Raw]) -> None:
        """A response of ours is known upstream by another id."""
        try:
            previous = _text(sent.get("previous_response_id", b"null"))
        except msgspec.DecodeError:
            return
        job = await self.find(caller.tenant, previous)
        if job is None or job.state != "succeeded":
            return
        result = await self._store.result(job.tenant, job.id)
        own = None if result is None else _answer_in(job, result)
        if own is not None and "id" in own:
            sent["previous_response_id"] = own["id"]


def is_background(values: Mapping[str, Raw]) -> bool:
    """Refusal for what some servers would take for true: the answer would be theirs, where nobody here can ask for it."""
    value = bytes(values.get("background", b"null"))
    if value not in {b"true", b"false", b"null"}:
        raise Refusal(400, "invalid_field", "`background` must be a boolean", "background")
    return value == b"true"


def response_of(job: Job, result: Result | None) -> bytes:
    """The response object, as JSON."""
    if job.state == "succeeded" and result is not None:
        answer = _answer_in(job, result)
        if answer is not None:
            return _encode(_own(job, answer))
    if not job.is_final:
        return _encode(_waiting(job, _STATUS[job.state]))
    if job.state == "cancelled":
        return _encode(_waiting(job, "cancelled"))
    error = {"code": "server_error", "message": job.error or "the response could not be generated"}
    if result is not None and 400 <= result.status < 500:
        error = {"code": "invalid_prompt", "message": _message_in(result) or error["message"]}
    return _encode(_waiting(job, "failed") | {"error": error})


def _waiting(job: Job, status: str) -> dict[str, Any]:
    """What is known of it without an answer."""
    return {
        "id": job.id,
        "object": "response",
        "created_at": int(job.submitted_time),
        "status": status,
        "background": True,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "model": job.model,
        "output": [],
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "usage": None,
        "user": None,
        **_ECHOED,
        **_fields(job.details or b"{}"),
    }


def _own(job: Job, answer: Mapping[str, Raw]) -> dict[str, Any]:
    """The upstream's response under our id."""
    return {**answer, "id": job.id, "background": True, "created_at": int(job.submitted_time)}


def _answer_in(job: Job, result: Result) -> dict[str, Raw] | None:
    """The upstream's response object, as JSON fields; None: there is none to be read."""
    try:
        if not job.is_stream or not result.body.startswith((b"event", b"data", b":", b"id", b"\xef")):
            return _fields(result.body)
        for event in reversed(result.body.replace(b"\r\n", b"\n").rstrip().split(b"\n\n")):
            found = decode(event)
            fields = {} if found is None else _fields(found.data)
            if "response" in fields:
                return _fields(fields["response"])
    except msgspec.DecodeError:
        pass
    return None


def _message_in(result: Result) -> str:
    try:
        error = _read_error(result.body).error
    except msgspec.DecodeError:
        return ""
    return error if isinstance(error, str) else error.message if error is not None else ""


def _renumbered(job: Job, event: bytes, number: int) -> tuple[str, bytes]:
    """Its type, and the event with our number and id; b"" for what is none."""
    found = decode(event)
    if found is None or not found.data.startswith(b"{"):
        return "", b""
    try:
        fields = _fields(found.data)
        kind = _text(fields.get("type", b'""'))
        more: dict[str, Any] = {"sequence_number": number}
        if "response" in fields:
            more["response"] = _own(job, _fields(fields["response"]))
    except msgspec.DecodeError:
        return "", b""
    return kind, _event(number, kind, fields | more).data


def _event(number: int, kind: str, fields: Mapping[str, Any]) -> Numbered:
    told = {"type": kind, **fields, "sequence_number": number}
    return Numbered(number, b"event: %b\nid: %d\ndata: %b\n\n" % (kind.encode(), number, _encode(told)))
