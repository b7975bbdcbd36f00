"""The paths of the queue's webhooks: receivers made, tried out, rotated and removed, and what they were told."""

import time
from collections.abc import Callable

from aiohttp import web
from pydantic import Field

from gateway.keys import expiry_of
from gateway.management.answers import answer, read_body
from gateway.management.keys import Body, parse
from gateway.overflow.webhooks import QueueWebhooks

_MOST_MESSAGES = 1000


class EndpointBody(Body):
    """`POST /api/webhooks`. `events`: `batch.completed`, `response.*`, ...; none: all."""

    tenant: str = Field(min_length=1, max_length=256)
    url: str = Field(min_length=1, max_length=2048)
    events: list[str] = Field(default_factory=list, max_length=64)


class GraceBody(Body):
    """`POST /api/webhooks/{webhook}/rotate`. `grace`: how long the old secret signs beside the new one."""

    grace: str = "24h"


class WebhookPaths:
    """Its handlers. `webhooks` None: there is no queue here."""

    def __init__(self, webhooks: Callable[[], QueueWebhooks | None]) -> None:
        self._find = webhooks

    def add_to(self, app: web.Application) -> None:
        router = app.router
        router.add_get("/api/webhooks", self._list)
        router.add_post("/api/webhooks", self._create)
        router.add_get("/api/webhooks/messages", self._messages)
        router.add_post("/api/webhooks/messages/{message}/replay", self._replay)
        router.add_get("/api/webhooks/{webhook}", self._show)
        router.add_delete("/api/webhooks/{webhook}", self._remove)
        router.add_post("/api/webhooks/{webhook}/rotate", self._rotate)
        router.add_post("/api/webhooks/{webhook}/enable", self._enable)
        router.add_post("/api/webhooks/{webhook}/test", self._test)

    @property
    def _webhooks(self) -> QueueWebhooks:
        webhooks = self._find()
        if webhooks is None:
            raise ValueError("There is no queue here: set `queue.enabled`.")
        return webhooks

    async def _list(self, request: web.Request) -> web.Response:
        return answer(await self._webhooks.listed(request.query.get("tenant", "")))

    async def _create(self, request: web.Request) -> web.Response:
        wanted = parse(EndpointBody, await read_body(request))
        return answer(await self._webhooks.create(wanted.tenant, wanted.url, wanted.events), 201)

    async def _show(self, request: web.Request) -> web.Response:
        return answer(await self._webhooks.shown(request.match_info["webhook"]))

    async def _remove(self, request: web.Request) -> web.Response:
        return answer(await self._webhooks.remove(request.match_info["webhook"]))

    async def _rotate(self, request: web.Request) -> web.Response:
        wanted = parse(GraceBody, await read_body(request) or b"{}")
        now_time = int(time.time())
        until_time = expiry_of(wanted.grace, now_time)
        if until_time is None:
            raise ValueError("The old secret must end some time: give a grace of 24h or 7d.")
        name = request.match_info["webhook"]
        return answer(await self._webhooks.rotate(name, max(0.0, until_time - now_time)))

    async def _enable(self, request: web.Request) -> web.Response:
        return answer(await self._webhooks.enable(request.match_info["webhook"]))

    async def _test(self, request: web.Request) -> web.Response:
        return answer(await self._webhooks.test(request.match_info["webhook"]))

    async def _messages(self, request: web.Request) -> web.Response:
        most = request.query.get("limit", "100")
        if not most.isdecimal() or not 1 <= int(most) <= _MOST_MESSAGES:
            raise ValueError(f"`limit` is a number from 1 to {_MOST_MESSAGES}.")
        return answer(await self._webhooks.messages(request.query.get("subject", ""), int(most)))

    async def _replay(self, request: web.Request) -> web.Response:
        return answer(await self._webhooks.replay(request.match_info["message"]))
