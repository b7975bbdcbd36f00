"""`GET /v1/models` and `/v1/models/{id}`: what this key may use, and nothing else.

Ids may contain `/`, plain or percent-encoded. In OpenAI's form, or Anthropic's for clients that send
`anthropic-version`.
"""

import datetime as dt
from typing import Any
from urllib.parse import unquote

import orjson

from backends.dialect import CHAT, MESSAGES, Dialect
from gateway.endpoints.context import Context
from gateway.errors import Headers, answer_headers, denial_answer
from gateway.inbound import Request
from gateway.intake import identify
from policies.access import may_use
from policies.exchange import Caller, Exchange
from policies.routing import Model
from policies.verdict import Denial


async def list_models(context: Context, request: Request, request_id: str) -> None:
    caller = _caller(context, request, request_id)
    if caller is None:
        return
    models = [model for model in context.runtime.catalog.models() if may_use(caller, model.name)]
    dialect = _dialect(request)
    cards = [_card(model, dialect) for model in models]
    if dialect is MESSAGES:
        ends = {"first_id": cards[0]["id"] if cards else None, "last_id": cards[-1]["id"] if cards else None}
        _respond(request, request_id, dialect, {"data": cards, "has_more": False, **ends})
    else:
        _respond(request, request_id, dialect, {"object": "list", "data": cards})


async def show_model(context: Context, request: Request, request_id: str) -> None:
    caller = _caller(context, request, request_id)
    if caller is None:
        return
    name = unquote(request.path.removeprefix("/v1/models/"))
    model = context.runtime.catalog.find(name) if may_use(caller, name) else None
    dialect = _dialect(request)
    if model is None:
        denial = Denial(
            404, "model_not_found", f"the model `{name}` does not exist here, or this key may not use it"
        )
        request.respond(*denial_answer(denial, dialect.family, request_id))
        return
    _respond(request, request_id, dialect, _card(model, dialect))


def _caller(context: Context, request: Request, request_id: str) -> Caller | None:
    """The caller, or None after the refusal was sent."""
    exchange = Exchange(request_id, _dialect(request), request.received_at, 0.0)
    denial = identify(exchange, request, context.runtime)
    if denial is not None:
        request.respond(*denial_answer(denial, exchange.dialect.family, request_id))
        return None
    return exchange.caller


def _dialect(request: Request) -> Dialect:
    return MESSAGES if b"anthropic-version" in request.headers else CHAT


def _card(model: Model, dialect: Dialect) -> dict[str, Any]:
    if dialect is MESSAGES:
        created = dt.datetime.fromtimestamp(model.created_time, dt.UTC)
        return {
            "type": "model",
            "id": model.name,
            "display_name": model.name,
            "created_at": created.isoformat(),
        }
    return {"id": model.name, "object": "model", "created": model.created_time, "owned_by": model.owner}


def _respond(request: Request, request_id: str, dialect: Dialect, content: dict[str, Any]) -> None:
    headers: Headers = [*answer_headers(dialect.family, request_id), (b"content-type", b"application/json")]
    request.respond(200, headers, orjson.dumps(content))
