"""How responses in the background are answered: the request that makes one, and whoever reads its stream.

Knows the connection; what is said, `gateway.overflow.background` knows.
"""

import asyncio
import time
from typing import Final

from gateway.errors import Headers, answer_headers
from gateway.inbound import Refusal, Request
from gateway.intake import Message
from gateway.overflow.background import DOOR, SILENCE, Background, is_background
from gateway.overflow.endpoints import Endpoints
from gateway.overflow.job import Job
from gateway.overflow.store import StoreAwayError
from gateway.overflow.submit import denial_of
from policies.exchange import Exchange
from policies.verdict import Denial

_KEEP_ALIVE_S: Final = 15.0


def wants_background(message: Message) -> bool:
    """Whether it is a request with `background: true`."""
    return message.document is not None and is_background(message.document.values)


class BackgroundPark:
    """Takes requests with `background: true` out of the pipeline."""

    def __init__(self, background: Background, webhooks: Endpoints) -> None:
        self._background = background
        self._webhooks = webhooks

    async def accept(self, exchange: Exchange, request: Request, message: Message) -> Denial | None:
        """Makes a job of it and answers: with the queued response, or with its stream. Refusal, or a Denial."""
        caller, document = exchange.caller, message.document
        assert caller is not None  # it has been identified
        assert document is not None  # it has been read
        url = request.headers.get(b"x-headgate-webhook", b"").decode("latin-1")
        try:
            webhook = await self._webhooks.names(caller.tenant, DOOR, url)
        except ValueError as error:
            raise Refusal(400, "invalid_webhook", f"`x-headgate-webhook`: {error}") from error
        except StoreAwayError as error:
            return denial_of(error)
        job = await self._background.create(
            caller,
            document.values,
            list(request.headers.items()),
            is_stream=exchange.is_stream,
            webhook=webhook,
        )
        if isinstance(job, Denial):
            return job
        exchange.ended, exchange.status = "parked", 200
        if exchange.is_stream:
            await send_events(self._background, request, exchange.request_id, job, -1)
        else:
            request.respond(200, response_headers(exchange.request_id, job), await self._background.told(job))
        return None


async def send_events(
    background: Background, request: Request, request_id: str, job: Job, after: int
) -> None:
    """A client that leaves ends the reading, never the response."""
    may_write = asyncio.Event()
    may_write.set()
    headers = [(n, v) for n, v in response_headers(request_id, job) if n != b"content-type"]
    request.start(200, [*headers, (b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])
    request.on_backpressure(may_write.clear, may_write.set)
    said_at = time.monotonic()
    async for event in background.events(job, after):
        if event is not SILENCE:
            await may_write.wait()
            request.write(event.data)
            said_at = time.monotonic()
        elif time.monotonic() - said_at >= _KEEP_ALIVE_S:
            request.write(b": waiting\n\n")
            said_at = time.monotonic()
    request.finish()


def response_headers(request_id: str, job: Job) -> Headers:
    return [
        *answer_headers("openai", request_id),
        (b"content-type", b"application/json"),
        (b"x-headgate-job", job.id.encode()),
    ]
