"""`/v1/jobs`: what of one's own is in the queue. Hand in, list, look at (and wait), take the result, cancel, delete.

A result is the answer of the API that was asked, with its status: an SDK can parse it as if it had just been given. A
stream can be read again from any of its events. Somebody else's job is not there.
"""

import time
from collections.abc import Mapping
from math import inf
from typing import Any, Final, cast, get_args

import orjson

from gateway.endpoints.asking import Asked, doors_of, for_callers, receivers_of, whole_number
from gateway.endpoints.context import Context
from gateway.errors import answer_headers, envelope, error_headers
from gateway.inbound import Refusal
from gateway.overflow.doors import Doors
from gateway.overflow.job import ALL_STATES, Job, JobClass, JobFilter
from gateway.overflow.job_view import accepted, ended_badly, job_document
from gateway.overflow.stand_in import read_head_event, read_kept_headers
from gateway.overflow.submit import Wish
from policies.verdict import Denial

PATH: Final = "/v1/jobs"
_DOORS: Final = ("job", "held")
_LONGEST_WAIT_S: Final = 60.0
_TOLD_EVERY_S: Final = 2.0
_KEEPALIVE_S: Final = 15.0
_LEAST_EXPIRY_S, _MOST_EXPIRY_S = 60.0, 604_800.0
_MAX_REFERENCE: Final = 512
_EVENT_STREAM: Final = b"text/event-stream"


@for_callers
async def create(context: Context, asked: Asked) -> None:
    """`{"endpoint": "/v1/chat/completions", "body": {...}}`; beside it `class`, `reference` and `expires_in_s`."""
    doors = doors_of(context)
    fields = await asked.document(context.runtime.body_bytes)
    unknown = set(fields) - {"endpoint", "body", "class", "reference", "expires_in_s"}
    if unknown:
        raise Refusal(400, "unknown_field", f"`{min(unknown)}` is no field of a job", min(unknown))
    body = fields.get("body")
    if not isinstance(body, dict):
        raise Refusal(400, "invalid_field", "`body` must be the request's body, a JSON object", "body")
    wish = Wish(
        caller=asked.caller,
        path=_text(fields, "endpoint", "the path that the request is for, as `/v1/chat/completions`"),
        body=orjson.dumps(body),
        headers=list(asked.request.headers.items()),
        job_class=_class(fields),
        is_stream=body.get("stream") is True,
        expires_in_s=_expiry(fields),
        idempotency_key=asked.request.headers.get(b"idempotency-key", b""),
        webhook=await receivers_of(context, asked, "job"),
        reference=_text(
            fields, "reference", f"a text of up to {_MAX_REFERENCE} characters", is_optional=True
        ),
    )
    job = await doors.submitter.submit(wish)
    if isinstance(job, Denial):
        asked.refuse(job)
        return
    doors.hint(job.lane)
    standing = await doors.store.standing(job.tenant, job.id)
    asked.request.respond(*accepted(job, standing, "openai", asked.request_id))


@for_callers
async def list_all(context: Context, asked: Asked) -> None:
    """Newest first; `after` is the `next` of the page before."""
    doors, query = doors_of(context), asked.query
    status = query.get("status", "")
    if status and status not in ALL_STATES:
        raise Refusal(400, "invalid_value", f"`status` is one of {', '.join(ALL_STATES)}", "status")
    where = JobFilter(tenant=asked.caller.tenant, doors=_DOORS, states=(status,) if status else ())
    page = await doors.store.list_jobs(where, query.get("after"), whole_number(query, "limit", 20, 100))
    asked.answer(
        {
            "object": "list",
            "data": [job_document(job) for job in page.jobs],
            "has_more": page.cursor is not None,
            "next": page.cursor,
        }
    )


@for_callers
async def show(context: Context, asked: Asked) -> None:
    """As it stands; with `?wait=30` when it has ended, at the latest after so many seconds; as events of SSE if those are
    what is accepted."""
    doors = doors_of(context)
    job = await _find(doors, asked)
    if _EVENT_STREAM in asked.request.headers.get(b"accept", b""):
        await _tell(doors, asked, job)
        return
    job = await _waited(doors, asked, job)
    standing = await doors.store.standing(job.tenant, job.id) if not job.is_final else None
    asked.answer(job_document(job, standing))


@for_callers
async def result(context: Context, asked: Asked) -> None:
    """The answer, with its own status and headers; 202 and the job while there is none; 410 when it is gone."""
    doors = doors_of(context)
    job = await _waited(doors, asked, await _find(doors, asked))
    if not job.is_final:
        standing = await doors.store.standing(job.tenant, job.id)
        asked.request.respond(*accepted(job, standing, "openai", asked.request_id))
        return
    found = await doors.store.result(job.tenant, job.id)
    if found is not None:
        headers = [*read_kept_headers(found.headers), *_own(asked, job)]
        if not any(name == b"content-type" for name, _ in headers):
            headers.append((b"content-type", b"application/json"))
        asked.request.respond(found.status, headers, found.body)
    elif job.is_purged:
        told = orjson.loads(envelope("openai", 410, "job_purged", _GONE, asked.request_id))
        body = orjson.dumps(told | {"job": job_document(job)})
        asked.request.respond(410, error_headers("openai", asked.request_id, None), body)
    else:
        asked.request.respond(*ended_badly(job, "openai", asked.request_id))


@for_callers
async def stream(context: Context, asked: Asked) -> None:
    """A stream's events again, those after `starting_after` or `Last-Event-ID`: what has come already, then the rest as it
    comes. A run that was begun again says so in a comment: what came before it belongs to another answer."""
    doors = doors_of(context)
    job = await _find(doors, asked)
    if not job.is_stream:
        message = "this job was not asked to stream: take its `result`"
        raise Refusal(400, "not_streamed", message, "stream")
    after = _starting_after(asked)
    request, said_at, fence = asked.request, time.monotonic(), 0
    request.start(200, [*_own(asked, job), (b"content-type", _EVENT_STREAM), (b"cache-control", b"no-store")])
    async for event in doors.watch.events(job.tenant, job.id, after, inf):
        if request.is_gone:
            return
        if event is None:
            if time.monotonic() - said_at >= _KEEPALIVE_S:
                said_at = time.monotonic()
                request.write(b": waiting\n\n")
            continue
        said_at = time.monotonic()
        if read_head_event(event.data) is None:
            request.write(b"id: %d\n%b" % (event.index, event.data))
        elif fence and fence != event.fence:
            request.write(b": begun again\n\n")
        fence = event.fence
    ended = await doors.store.get(job.tenant, job.id)
    if ended is not None and ended.state == "succeeded":
        request.finish()
        return
    code, message = "job_ended", f"the job is {ended.state if ended is not None else 'gone'}"
    request.write(b"event: error\ndata: %b\n\n" % envelope("openai", 502, code, message, asked.request_id))
    request.finish()


@for_callers
async def cancel(context: Context, asked: Asked) -> None:
    """One that waits costs nothing; of one that runs what it has used so far is billed. One that has ended stays as it is."""
    doors = doors_of(context)
    job = await _find(doors, asked)
    asked.answer(job_document(await _cancelled(doors, job)))


@for_callers
async def delete(context: Context, asked: Asked) -> None:
    """Cancels one that has not ended; of one that has, request and result are really deleted."""
    doors = doors_of(context)
    job = await _find(doors, asked)
    if job.is_final:
        job = await doors.store.purge(job.tenant, job.id) or job
    else:
        job = await _cancelled(doors, job)
    asked.answer(job_document(job))


_GONE: Final = "the result of this job is no longer kept"


async def _find(doors: Doors, asked: Asked) -> Job:
    job_id = asked.request.path.removeprefix(f"{PATH}/").partition("/")[0]
    job = await doors.store.get(asked.caller.tenant, job_id)
    if job is None:
        raise Refusal(404, "job_not_found", f"there is no job `{job_id[:80]}`", "job_id")
    return job


async def _waited(doors: Doors, asked: Asked, job: Job) -> Job:
    text = asked.query.get("wait")
    if text is None:
        return job
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= _LONGEST_WAIT_S:
        raise Refusal(400, "invalid_value", f"`wait` is a time from 0 to {_LONGEST_WAIT_S:g} seconds", "wait")
    if job.is_final:
        return job
    return await doors.watch.final(job.tenant, job.id, time.monotonic() + wait_s) or job


async def _cancelled(doors: Doors, job: Job) -> Job:
    found = await doors.store.cancel(job.tenant, job.id)
    if found is not None and found.state == "cancelling":
        doors.cancelled(job.id)
    elif found is not None:
        doors.watch.changed(job.id)
    return found or job


async def _tell(doors: Doors, asked: Asked, job: Job) -> None:
    """The job as events, one whenever it has changed, until it has ended."""
    request, told, said_at, number = asked.request, b"", 0.0, 0
    request.start(200, [*_own(asked, job), (b"content-type", _EVENT_STREAM), (b"cache-control", b"no-store")])
    while not request.is_gone:
        standing = await doors.store.standing(job.tenant, job.id) if not job.is_final else None
        now, document = time.monotonic(), job_document(job, standing)
        if (text := orjson.dumps(document | {"eta_s": None})) != told:
            told, said_at = text, now
            request.write(b"event: job\nid: %d\ndata: %b\n\n" % (number, orjson.dumps(document)))
            number += 1
        elif now - said_at >= _KEEPALIVE_S:
            said_at = now
            request.write(b": waiting\n\n")
        if job.is_final:
            break
        job = await doors.watch.final(job.tenant, job.id, now + _TOLD_EVERY_S) or job
    request.finish()


def _own(asked: Asked, job: Job) -> list[tuple[bytes, bytes]]:
    return [*answer_headers("openai", asked.request_id), (b"x-headgate-job", job.id.encode())]


def _starting_after(asked: Asked) -> int:
    text = asked.query.get("starting_after")
    if text is None:
        text = asked.request.headers.get(b"last-event-id", b"-1").decode("latin-1")
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdigit()) or len(digits) > 15:
        raise Refusal(400, "invalid_value", "`starting_after` is the number of an event", "starting_after")
    return max(-1, int(text))


def _text(fields: Mapping[str, Any], name: str, wanted: str, *, is_optional: bool = False) -> str:
    value = fields.get(name)
    if value is None and is_optional:
        return ""
    if not isinstance(value, str) or not value.isprintable() or len(value) > _MAX_REFERENCE:
        raise Refusal(400, "invalid_field", f"`{name}` must be {wanted}", name)
    return value


def _class(fields: Mapping[str, Any]) -> JobClass:
    value = fields.get("class", "flex")
    if value not in get_args(JobClass):
        raise Refusal(400, "invalid_field", "`class` is `flex` or `batch`", "class")
    return cast("JobClass", value)


def _expiry(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("expires_in_s")
    if value is None:
        return None
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not _LEAST_EXPIRY_S <= value <= _MOST_EXPIRY_S
    ):
        raise Refusal(
            400, "invalid_field", "`expires_in_s` is a time from 60 to 604800 seconds", "expires_in_s"
        )
    return float(value)
