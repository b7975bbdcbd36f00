"""`/v1/batches`: create, look at, list, cancel. After OpenAI's API; what a batch is, `gateway.overflow.batches` knows."""

import re
from typing import Any, Final

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from gateway.endpoints.asking import Asked, doors_of, for_callers, receivers_of, whole_number
from gateway.endpoints.context import Context
from gateway.idempotency import HEADER
from gateway.inbound import Refusal
from gateway.overflow.batches import DOOR, NewBatch, shown
from gateway.overflow.job import Parent

PATH: Final = "/v1/batches"
ENDPOINTS: Final = tuple(dialect.path for dialect in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES))
_WINDOW: Final = re.compile(r"([1-9][0-9]{0,4})([mhd])")
_SECONDS: Final = {"m": 60.0, "h": 3600.0, "d": 86_400.0}
_WEEK_S: Final = 604_800.0
_FIELDS: Final = frozenset(
    {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
)
_MOST_LISTED: Final = 100


@for_callers
async def create(context: Context, asked: Asked) -> None:
    doors = doors_of(context)
    new = _read(await asked.document())
    webhook = await receivers_of(context, asked, DOOR)
    key = asked.request.headers.get(HEADER, b"")
    asked.answer(shown(await doors.batches.create(asked.caller, new, key, webhook)))


@for_callers
async def list_all(context: Context, asked: Asked) -> None:
    query = asked.query
    limit = whole_number(query, "limit", 20, _MOST_LISTED)
    found, has_more = await doors_of(context).batches.page(asked.caller.tenant, query.get("after", ""), limit)
    asked.answer(
        {
            "object": "list",
            "data": [shown(parent) for parent in found],
            "first_id": found[0].id if found else None,
            "last_id": found[-1].id if found else None,
            "has_more": has_more,
        }
    )


@for_callers
async def show(context: Context, asked: Asked) -> None:
    batch_id = _batch_id(asked)
    asked.answer(shown(_found(await doors_of(context).batches.find(asked.caller.tenant, batch_id), batch_id)))


@for_callers
async def cancel(context: Context, asked: Asked) -> None:
    batch_id = _batch_id(asked)
    batches = doors_of(context).batches
    parent = _found(await batches.find(asked.caller.tenant, batch_id), batch_id)
    if parent.is_final and parent.state != "cancelled":
        raise Refusal(
            409, "batch_ended", f"the batch has the status `{parent.state}`: it cannot be cancelled any more"
        )
    asked.answer(shown(_found(await batches.cancel(asked.caller.tenant, batch_id), batch_id)))


def _batch_id(asked: Asked) -> str:
    return asked.request.path.removeprefix(f"{PATH}/").removesuffix("/cancel")


def _found(parent: Parent | None, batch_id: str) -> Parent:
    if parent is None:
        raise Refusal(404, "batch_not_found", f"there is no batch `{batch_id[:80]}`", "batch_id")
    return parent


def _read(document: dict[str, Any]) -> NewBatch:
    for name in document:
        if name not in _FIELDS:
            raise Refusal(400, "unknown_parameter", f"`{name[:64]}` is no parameter of a batch", name[:64])
    endpoint = _text(document, "endpoint")
    if endpoint not in ENDPOINTS:
        taken = ", ".join(f"`{path}`" for path in ENDPOINTS)
        raise Refusal(400, "invalid_value", f"`endpoint` must be one of {taken}", "endpoint")
    window = _text(document, "completion_window")
    match = _WINDOW.fullmatch(window)
    window_s = int(match[1]) * _SECONDS[match[2]] if match is not None else 0.0
    if not 60.0 <= window_s <= _WEEK_S:
        message = "`completion_window` must be a time from `1m` to `7d`, as `24h`"
        raise Refusal(400, "invalid_value", message, "completion_window")
    return NewBatch(
        endpoint=endpoint,
        input_file_id=_text(document, "input_file_id"),
        completion_window=window,
        window_s=window_s,
        metadata=_metadata(document.get("metadata")),
        output_keep_s=_keep_s(document.get("output_expires_after")),
    )


def _text(document: dict[str, Any], name: str) -> str:
    value = document.get(name)
    if value is None:
        raise Refusal(400, "missing_required_parameter", f"`{name}` is missing", name)
    if not isinstance(value, str):
        raise Refusal(400, "invalid_type", f"`{name}` must be a string", name)
    return value


def _metadata(value: Any) -> dict[str, str] | None:
    """As OpenAI bounds it: 16 pairs, keys of 64 and values of 512 characters."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > 16:
        raise Refusal(400, "invalid_type", "`metadata` must be an object with up to 16 pairs", "metadata")
    for key, text in value.items():
        if len(key) > 64 or not isinstance(text, str) or len(text) > 512:
            message = "in `metadata`, keys have up to 64 characters, and values are strings of up to 512"
            raise Refusal(400, "invalid_value", message, "metadata")
    return value


def _keep_s(value: Any) -> float | None:
    if value is None:
        return None
    found = value if isinstance(value, dict) else {}
    seconds: Any = found.get("seconds")
    is_whole = isinstance(seconds, int) and not isinstance(seconds, bool)
    if not is_whole or found.get("anchor") != "created_at" or not 3600 <= seconds <= 2_592_000:
        message = "`output_expires_after` takes the anchor `created_at` and 3600 to 2592000 seconds"
        raise Refusal(400, "invalid_value", message, "output_expires_after")
    return float(seconds)
