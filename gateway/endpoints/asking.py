"""What endpoints share that look after things of their caller (files, batches, jobs) and send nothing to a model.

The key is checked before the endpoint runs, so nothing of the body has been read by then. Whatever it refuses is
said in OpenAI's envelope, with the request's id.
"""

import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl

import orjson

from backends.dialect import CHAT
from gateway.endpoints.context import Context
from gateway.errors import answer_headers, denial_answer
from gateway.inbound import Refusal, Request
from gateway.ingress import check_content_type, decode_body
from gateway.intake import identify
from gateway.overflow.doors import Doors
from gateway.overflow.job import Door
from gateway.overflow.store import IdempotencyConflictError, QueueFullError
from gateway.overflow.submit import denial_of
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import StorageError
from policies.exchange import Caller, Exchange
from policies.verdict import Denial

_log = logging.getLogger(__name__)

# What these endpoints take as JSON is small, mostly.
BODY_BYTES: Final = 1024 * 1024


class Asked(NamedTuple):
    """One request to such an endpoint, by somebody known."""

    request: Request
    request_id: str
    caller: Caller

    @property
    def query(self) -> Mapping[str, str]:
        """The last of each name."""
        return dict(parse_qsl(self.request.query, keep_blank_values=True))

    async def document(self, limit_bytes: int = BODY_BYTES) -> dict[str, Any]:
        """The body, a JSON object; empty if there is no body. Refusal when it is anything else."""
        request = self.request
        raw = await request.body()
        body = await decode_body(raw, request.headers.get(b"content-encoding"), limit_bytes)
        if not body.strip():
            return {}
        check_content_type(request.headers.get(b"content-type"))
        try:
            document = orjson.loads(body)
        except ValueError as error:
            raise Refusal(400, "invalid_json", f"the request body is not valid JSON: {error}") from error
        if not isinstance(document, dict):
            raise Refusal(400, "invalid_json", "the request body must be a JSON object")
        return document

    def answer(self, content: Any, status: int = 200) -> None:
        """JSON."""
        headers = [*answer_headers("openai", self.request_id), (b"content-type", b"application/json")]
        self.request.respond(status, headers, orjson.dumps(content))

    def refuse(self, denial: Denial) -> None:
        """In OpenAI's envelope."""
        self.request.respond(*denial_answer(denial, "openai", self.request_id))


Serve = Callable[[Context, Asked], Awaitable[None]]
Endpoint = Callable[[Context, Request, str], Awaitable[None]]


def for_callers(serve: Serve) -> Endpoint:
    """The endpoint that runs `serve` for those who have a key, and says what it refuses."""

    @functools.wraps(serve)
    async def endpoint(context: Context, request: Request, request_id: str) -> None:
        exchange = Exchange(request_id, CHAT, request.received_at, 0.0)
        denial = identify(exchange, request, context.runtime)
        try:
            if denial is None:
                assert exchange.caller is not None  # identify found it
                await serve(context, Asked(request, request_id, exchange.caller))
        except Refusal as refusal:
            denial = Denial(refusal.status, refusal.code, refusal.message, refusal.param)
        except (QueueFullError, IdempotencyConflictError) as error:
            denial = denial_of(error)
        except (StorageError, StoreAwayError) as error:
            _log.error("%s %s: %s", request.method, request.path, error, extra={"request_id": request_id})
            denial = Denial(503, "storage_unavailable", "the storage cannot be used now", retry_after_s=1.0)
        if denial is None:
            return
        if request.is_started:
            request.abort()
        else:
            request.respond(*denial_answer(denial, "openai", request_id))

    return endpoint


def doors_of(context: Context) -> Doors:
    """Refusal where the gateway has no queue."""
    if context.doors is None:
        raise Refusal(
            404, "no_queue", "this gateway has no queue: its operator turns it on with `queue.enabled`"
        )
    return context.doors


async def receivers_of(context: Context, asked: Asked, door: Door) -> str:
    """Who is to hear of what is handed in here, the URL in `x-headgate-webhook` among them. Refusal when that is no good."""
    url = asked.request.headers.get(b"x-headgate-webhook", b"").decode("latin-1")
    try:
        return await doors_of(context).webhooks.names(asked.caller.tenant, door, url)
    except ValueError as error:
        raise Refusal(400, "invalid_webhook", f"`x-headgate-webhook`: {error}") from error


def whole_number(query: Mapping[str, str], name: str, default: int, most: int) -> int:
    """A query parameter from 1 to `most`. Refusal when it is anything else."""
    text = query.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= most:
        raise Refusal(400, "invalid_value", f"`{name}` must be an integer from 1 to {most}", name)
    return int(text)
