"""A request's body and an answer's, as all paths of the management plane have them."""

import asyncio
from typing import Any, Final

import orjson
from aiohttp import web

BODY_S: Final = 10.0


async def read_body(request: web.Request) -> bytes:
    """TimeoutError when it does not arrive in time."""
    async with asyncio.timeout(BODY_S):
        return await request.read()


def answer(told: Any, status: int = 200) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(told, option=orjson.OPT_APPEND_NEWLINE),
        content_type="application/json",
    )
