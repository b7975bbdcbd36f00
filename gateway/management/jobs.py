"""The paths of the queue's jobs: how full it is, what is in it, cancel, replay, and stop drawing."""

from collections.abc import Callable

from aiohttp import web

from gateway.management.answers import answer
from gateway.overflow.operating import QueueOperators

_MOST = 1000


class JobPaths:
    """Its handlers. `operators` None: there is no queue here."""

    def __init__(self, operators: Callable[[], QueueOperators | None]) -> None:
        self._find = operators

    def add_to(self, app: web.Application) -> None:
        router = app.router
        router.add_get("/api/jobs", self._list)
        router.add_get("/api/jobs/stats", self._stats)
        router.add_post("/api/jobs/drain", self._drain)
        router.add_delete("/api/jobs/drain", self._resume)
        router.add_get("/api/jobs/{job}", self._show)
        router.add_post("/api/jobs/{job}/cancel", self._cancel)
        router.add_post("/api/jobs/{job}/replay", self._replay)

    @property
    def _operators(self) -> QueueOperators:
        operators = self._find()
        if operators is None:
            raise ValueError("There is no queue here: set `queue.enabled`.")
        return operators

    async def _list(self, request: web.Request) -> web.Response:
        limit = request.query.get("limit", "50")
        if not limit.isdecimal() or not 1 <= int(limit) <= _MOST:
            raise ValueError(f"`limit` is a number from 1 to {_MOST}.")
        return answer(await self._operators.listed(dict(request.query), int(limit)))

    async def _stats(self, _: web.Request) -> web.Response:
        return answer(await self._operators.stats())

    async def _show(self, request: web.Request) -> web.Response:
        return answer(await self._operators.shown(request.match_info["job"]))

    async def _cancel(self, request: web.Request) -> web.Response:
        return answer(await self._operators.cancel(request.match_info["job"]))

    async def _replay(self, request: web.Request) -> web.Response:
        return answer(await self._operators.replay(request.match_info["job"]), 201)

    async def _drain(self, _: web.Request) -> web.Response:
        return answer(self._operators.drain(is_drained=True))

    async def _resume(self, _: web.Request) -> web.Response:
        return answer(self._operators.drain(is_drained=False))
