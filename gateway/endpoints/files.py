"""`/v1/files`: upload (as it comes, straight to the disk), list, look at, download, delete. After OpenAI's API.

A file belongs to a tenant; somebody else's is one that does not exist.
"""

import asyncio
from typing import Final

from gateway.endpoints.asking import Asked, doors_of, for_callers, whole_number
from gateway.endpoints.context import Context
from gateway.errors import answer_headers
from gateway.inbound import Refusal
from gateway.overflow.files import Files
from gateway.overflow.shelf import FileRecord

PATH: Final = "/v1/files"
_MOST_LISTED: Final = 10_000


@for_callers
async def create(context: Context, asked: Asked) -> None:
    request = asked.request
    if b"content-encoding" in request.headers:
        raise Refusal(415, "unsupported_encoding", "send files without `Content-Encoding`")
    record = await _files(context).upload(
        asked.caller.tenant, request.headers.get(b"content-type"), request.pieces()
    )
    asked.answer(record.shown())


@for_callers
async def list_all(context: Context, asked: Asked) -> None:
    query = asked.query
    order = query.get("order", "desc")
    if order not in {"asc", "desc"}:
        raise Refusal(400, "invalid_value", "`order` must be `asc` or `desc`", "order")
    found, has_more = await _files(context).page(
        asked.caller.tenant,
        purpose=query.get("purpose", ""),
        limit=whole_number(query, "limit", _MOST_LISTED, _MOST_LISTED),
        after=query.get("after", ""),
        is_ascending=order == "asc",
    )
    asked.answer(
        {
            "object": "list",
            "data": [record.shown() for record in found],
            "first_id": found[0].id if found else None,
            "last_id": found[-1].id if found else None,
            "has_more": has_more,
        }
    )


@for_callers
async def show(context: Context, asked: Asked) -> None:
    asked.answer((await _find(context, asked)).shown())


@for_callers
async def delete(context: Context, asked: Asked) -> None:
    file_id = _file_id(asked)
    if not await _files(context).delete(asked.caller.tenant, file_id):
        raise _missing(file_id)
    asked.answer({"id": file_id, "object": "file", "deleted": True})


@for_callers
async def content(context: Context, asked: Asked) -> None:
    record = await _find(context, asked)
    request = asked.request
    frames = _files(context).content(asked.caller.tenant, record)
    first = await anext(frames, b"")  # what cannot be read is an error, not a short answer
    may_write = asyncio.Event()
    may_write.set()
    request.start(
        200,
        [*answer_headers("openai", asked.request_id), (b"content-type", b"application/octet-stream")],
    )
    request.on_backpressure(may_write.clear, may_write.set)
    request.write(first)
    async for frame in frames:
        await may_write.wait()
        request.write(frame)
    request.finish()


def _files(context: Context) -> Files:
    return doors_of(context).files


def _file_id(asked: Asked) -> str:
    return asked.request.path.removeprefix(f"{PATH}/").removesuffix("/content")


async def _find(context: Context, asked: Asked) -> FileRecord:
    file_id = _file_id(asked)
    record = await _files(context).find(asked.caller.tenant, file_id)
    if record is None:
        raise _missing(file_id)
    return record


def _missing(file_id: str) -> Refusal:
    return Refusal(404, "file_not_found", f"there is no file `{file_id[:80]}`", "id")
