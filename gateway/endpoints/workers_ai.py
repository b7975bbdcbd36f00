"""`/client/v4/accounts/{account}/ai/...`: Workers AI's paths. `run` in the native form, at once or queued; `v1` is OpenAI's
routes under another name; `requests` looks after what is queued. The account is whoever the key says.

Whatever is refused below `run` and `requests` is said in Cloudflare's envelope.
"""

import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote

import msgspec
from msgspec import Raw

from gateway.endpoints.asking import Asked, Endpoint, doors_of, for_callers, receivers_of, whole_number
from gateway.endpoints.context import Context
from gateway.errors import answer_headers, denial_answer
from gateway.idempotency import HEADER
from gateway.inbound import Refusal, Request
from gateway.ingress import decode_body
from gateway.overflow.job import Parent
from gateway.overflow.native_requests import DOOR, NativeRequests, read_options, standing, summary
from gateway.workers_ai.envelope import succeeded
from gateway.workers_ai.forms import read_fields, translate
from gateway.workers_ai.native_answer import NativeAnswer
from policies.exchange import Exchange
from policies.verdict import Denial

PREFIX: Final = "/client/v4/accounts/"
_RUN: Final = "ai/run"
_REQUESTS: Final = "ai/requests"
_V1: Final = "ai/v1/"
_MOST_LISTED: Final = 100
_TRUE: Final = frozenset({"true", "1"})


def openai_path(path: str) -> str | None:
    """The path of the OpenAI route that this one is another name of; None: it is none of those."""
    rest = _below_account(path)
    return f"/v1/{rest[len(_V1) :]}" if rest.startswith(_V1) else None


def methods_of(request: Request) -> Mapping[str, Endpoint]:
    """What may be done at a path of ours, if anything. From here on all that is answered is in the envelope."""
    request.translation = NativeAnswer()
    rest = _below_account(request.path)
    if rest == _RUN or rest.startswith(f"{_RUN}/"):
        return {"POST": run}
    if rest == _REQUESTS:
        return {"GET": list_requests}
    if rest.startswith(f"{_REQUESTS}/") and rest.count("/") == 2:
        return {"GET": show_request, "DELETE": cancel_request}
    return {}


def _below_account(path: str) -> str:
    return path[len(PREFIX) :].partition("/")[2]


@for_callers
async def run(context: Context, asked: Asked) -> None:
    """Any content type: Cloudflare's own examples post JSON as curl does by default."""
    request, runtime = asked.request, context.runtime
    raw = await request.body()
    body = await decode_body(raw, request.headers.get(b"content-encoding"), runtime.body_bytes)
    model, fields = _model_and_input(request, read_fields(body))
    if "request_id" in fields:
        await _poll(context, asked, fields)
    elif _is_queued(asked, fields):
        await _submit(context, asked, model, fields)
    else:
        if "requests" in fields:
            message = "`requests` is for the queue: add `?queueRequest=true`"
            raise Refusal(400, "missing_required_parameter", message, "queueRequest")
        await _run_now(context, asked, model, fields)


async def _run_now(context: Context, asked: Asked, model: str, fields: dict[str, Raw]) -> None:
    request = asked.request
    translated = translate(model, fields)
    if _rejects_if_busy(fields):
        request.headers[b"x-headgate-on-full"] = b"reject"
    answer = NativeAnswer()
    answer.form = translated.form
    request.translation = answer
    request.replace_body(translated.body, b"application/json")
    exchange = Exchange(asked.request_id, translated.dialect, request.received_at, time.time())
    await context.pipeline.handle(request, exchange)


async def _submit(context: Context, asked: Asked, model: str, fields: dict[str, Raw]) -> None:
    options = read_options(fields)
    if options.webhook_url:
        asked.request.headers[b"x-headgate-webhook"] = options.webhook_url.encode("latin-1", "replace")
    key = asked.request.headers.get(HEADER, b"")
    made = await _requests(context).submit(
        asked.caller,
        model,
        fields,
        idempotency_key=key,
        webhook=await receivers_of(context, asked, DOOR),
    )
    if isinstance(made, Denial):
        asked.request.respond(*denial_answer(made, "openai", asked.request_id))
        return
    _answer(asked, {"status": "queued", **summary(made)})


async def _poll(context: Context, asked: Asked, fields: dict[str, Raw]) -> None:
    try:
        request_id = msgspec.json.decode(fields["request_id"], type=str)
    except msgspec.DecodeError as error:
        raise Refusal(400, "invalid_type", "`request_id` must be a string", "request_id") from error
    parent = await _find(context, asked, request_id)
    if not parent.is_final:
        _answer(asked, standing(parent))
        return
    request = asked.request
    request.translation = None  # it is in the envelope already
    request.start(200, [*answer_headers("openai", asked.request_id), (b"content-type", b"application/json")])
    request.write(b'{"result":{')
    async for piece in _requests(context).responses(parent):
        request.write(piece)
    request.write(b'},"success":true,"errors":[],"messages":[]}')
    request.finish()


@for_callers
async def list_requests(context: Context, asked: Asked) -> None:
    query = asked.query
    limit = whole_number(query, "limit", 20, _MOST_LISTED)
    found, has_more = await _requests(context).page(asked.caller.tenant, query.get("after", ""), limit)
    told = [{"status": _status(parent), **summary(parent)} for parent in found]
    _answer(asked, {"requests": told, "has_more": has_more})


@for_callers
async def show_request(context: Context, asked: Asked) -> None:
    parent = await _find(context, asked, _id_in(asked.request.path))
    items = await _requests(context).items(parent)
    _answer(asked, {"status": _status(parent), **summary(parent), "items": items})


@for_callers
async def cancel_request(context: Context, asked: Asked) -> None:
    request_id = _id_in(asked.request.path)
    parent = await _requests(context).cancel(asked.caller.tenant, request_id)
    if parent is None:
        raise _missing(request_id)
    _answer(asked, {"status": _status(parent), **summary(parent)})


def _requests(context: Context) -> NativeRequests:
    return doors_of(context).native


async def _find(context: Context, asked: Asked, request_id: str) -> Parent:
    parent = await _requests(context).find(asked.caller.tenant, request_id)
    if parent is None:
        raise _missing(request_id)
    return parent


def _missing(request_id: str) -> Refusal:
    return Refusal(404, "request_not_found", f"there is no request `{request_id[:80]}`", "request_id")


def _status(parent: Parent) -> str:
    return parent.state if parent.is_final or parent.state == "cancelling" else standing(parent)["status"]


def _answer(asked: Asked, result: Any) -> None:
    headers = [*answer_headers("openai", asked.request_id), (b"content-type", b"application/json")]
    asked.request.respond(200, headers, succeeded(result))


def _model_and_input(request: Request, fields: dict[str, Raw]) -> tuple[str, dict[str, Raw]]:
    """The model is in the path; or in the body, with the input beside it (`/ai/run`)."""
    model = unquote(_below_account(request.path)[len(_RUN) :].strip("/"))
    if model:
        return model, fields
    try:
        model = msgspec.json.decode(fields.get("model", b"null"), type=str)
        inner = msgspec.json.decode(fields.get("input", b"{}"), type=dict[str, Raw])
    except msgspec.DecodeError as error:
        message = "send `model`, a string, and `input`, an object; or the model in the path"
        raise Refusal(400, "missing_required_parameter", message, "model") from error
    beside = {name: value for name, value in fields.items() if name not in {"model", "input"}}
    return model, {**inner, **beside}


def _is_queued(asked: Asked, fields: dict[str, Raw]) -> bool:
    asks = asked.query.get("queueRequest", "").lower() in _TRUE
    return asks or bytes(fields.get("queueRequest", b"")) == b"true" or read_options(fields).background


def _rejects_if_busy(fields: dict[str, Raw]) -> bool:
    if bytes(fields.get("rejectIfBusy", b"")) == b"true":
        return True
    try:
        options = msgspec.json.decode(fields.get("options", b"{}"), type=dict[str, Raw])
    except msgspec.DecodeError:
        return False
    return bytes(options.get("rejectIfBusy", b"")) == b"true"


def _id_in(path: str) -> str:
    return path.rpartition("/")[2]
