"""`/v1/responses/{id}`: responses that run in the background. Look at, cancel, delete, and read their stream again.

`?stream=true` gives the events after `starting_after` (or the header `Last-Event-ID`): what has come already, then the
rest as it comes. Reading costs nothing, however often.
"""

from typing import Final

from gateway.endpoints.asking import Asked, doors_of, for_callers
from gateway.endpoints.context import Context
from gateway.inbound import Refusal
from gateway.overflow.background import Background
from gateway.overflow.background_answer import response_headers, send_events
from gateway.overflow.job import Job

PATH: Final = "/v1/responses"
_NUMBER_DIGITS: Final = 15


@for_callers
async def show(context: Context, asked: Asked) -> None:
    background = doors_of(context).background
    job = await _find(background, asked)
    if asked.query.get("stream", "").lower() != "true":
        asked.request.respond(200, response_headers(asked.request_id, job), await background.told(job))
        return
    if not job.is_stream:
        message = "this response was not created with `stream: true`: it has no events, poll it"
        raise Refusal(400, "not_streamed", message, "stream")
    await send_events(background, asked.request, asked.request_id, job, _starting_after(asked))


@for_callers
async def cancel(context: Context, asked: Asked) -> None:
    background = doors_of(context).background
    job = await background.cancel(await _find(background, asked))
    asked.request.respond(200, response_headers(asked.request_id, job), await background.told(job))


@for_callers
async def delete(context: Context, asked: Asked) -> None:
    background = doors_of(context).background
    job = await _find(background, asked)
    await background.delete(job)
    asked.answer({"id": job.id, "object": "response", "deleted": True})


async def _find(background: Background, asked: Asked) -> Job:
    response_id = asked.request.path.removeprefix(f"{PATH}/").removesuffix("/cancel")
    job = await background.find(asked.caller.tenant, response_id)
    if job is None:
        message = f"there is no response `{response_id[:80]}` that ran in the background"
        raise Refusal(404, "response_not_found", message, "response_id")
    return job


def _starting_after(asked: Asked) -> int:
    text = asked.query.get("starting_after")
    if text is None:
        text = asked.request.headers.get(b"last-event-id", b"-1").decode("latin-1")
    digits = text.removeprefix("-")
    if not digits.isascii() or not digits.isdigit() or len(digits) > _NUMBER_DIGITS:
        raise Refusal(
            400, "invalid_value", "`starting_after` must be the sequence number of an event", "starting_after"
        )
    return int(text)
