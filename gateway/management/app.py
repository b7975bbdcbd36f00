"""The management plane: an aiohttp application on a listener of its own, for operators.

Owns its routes, its door and its errors. Every path but liveness and readiness wants an operator's key; a
caller's key is refused with a word on where it belongs. Runs in the parent, so it answers while workers come and
go. Knows the service only by the protocol below.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, cast, get_args

from aiohttp import web

from gateway.engines import Engines
from gateway.errors import envelope
from gateway.exposition import CONTENT_TYPE
from gateway.key_lifecycle import UnknownKeyError
from gateway.keys import KeyProblem, Keyring, Operator
from gateway.limit_lifecycle import UnknownLimitError, UnknownTeamError
from gateway.limits_config import LimitConfig
from gateway.management import engines, keys, limits
from gateway.management.answers import answer, read_body
from gateway.management.jobs import JobPaths
from gateway.management.webhooks import WebhookPaths
from gateway.overflow.operating import QueueOperators, UnknownJobError
from gateway.overflow.webhooks import QueueWebhooks, UnknownEndpointError, UnknownMessageError
from gateway.reload import Reloaded
from gateway.spend import GroupBy, Period, moment_us, spend_by, total_spend
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, database
from gateway.tenants import Declared
from policies.exchange import Caller

BODY_BYTES: Final = 64 * 1024
_OPEN_PATHS: Final = frozenset({"/livez", "/readyz"})

_log = logging.getLogger(__name__)


class Service(Protocol):
    """What is managed."""

    @property
    def is_ready(self) -> bool: ...

    def readiness(self) -> dict[str, str]:
        """Beside ok or not: no addresses, no secrets."""

    @property
    def has_open_metrics(self) -> bool:
        """Whether `/metrics` wants no key."""

    @property
    def declared(self) -> Declared:
        """Teams and limits of the running configuration."""

    @property
    def declared_key_names(self) -> frozenset[str]:
        """Callers' keys of the running configuration."""

    @property
    def jobs(self) -> QueueOperators | None:
        """The queue's; None: there is no queue."""

    @property
    def webhooks(self) -> QueueWebhooks | None:
        """The queue's; None: there is no queue."""

    async def metrics(self) -> bytes: ...

    def status(self) -> dict[str, Any]: ...

    async def reload(self) -> Reloaded:
        """Reads the configuration file again. RuntimeError when it is valid and could still not be applied."""

    def restart(self) -> bool:
        """Begins to rotate the workers; False when a rotation is under way."""

    @property
    def engines(self) -> Engines:
        """Those that Headgate runs."""


class _Refusal(NamedTuple):
    status: int
    code: str
    message: str


_PROBLEMS: Final[dict[KeyProblem, _Refusal]] = {
    "unknown": _Refusal(
        401, "invalid_api_key", "This key is not known. `headgate keys create --operator` makes one."
    ),
    "expired": _Refusal(401, "expired_api_key", "This key has expired: make another, or rotate it."),
    "revoked": _Refusal(401, "revoked_api_key", "This key was revoked: make another."),
    "blocked": _Refusal(403, "blocked_api_key", "This key is blocked: unblock it, or use another."),
}


# What is not known, and where it would be listed.
_NOUNS: Final[dict[type[LookupError], tuple[str, str]]] = {
    UnknownKeyError: ("key", "/api/keys"),
    UnknownTeamError: ("team", "/api/teams"),
    UnknownLimitError: ("limit", "/api/limits"),
    UnknownEndpointError: ("webhook", "/api/webhooks"),
    UnknownMessageError: ("message", "/api/webhooks/messages"),
    UnknownJobError: ("job", "/api/jobs"),
}


class Plane:
    """The application's handlers."""

    def __init__(self, service: Service, keyring: Keyring, storage: Path, pepper: bytes) -> None:
        self._service = service
        self._keyring = keyring
        self._storage = storage
        self._pepper = pepper

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._door], client_max_size=BODY_BYTES)
        app.on_response_prepare.append(_hide_server)
        app.router.add_get("/livez", self._live)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        app.router.add_get("/api/status", self._status)
        app.router.add_get("/api/costs", self._costs)
        app.router.add_post("/api/reload", self._reload)
        app.router.add_post("/api/restart", self._restart)
        app.router.add_get("/api/engines", self._list_engines)
        app.router.add_post("/api/engines/{pool}/{action}", self._act_on_engines)
        app.router.add_get("/api/keys", self._list_keys)
        app.router.add_post("/api/keys", self._create_key)
        app.router.add_get("/api/keys/{key}", self._show_key)
        app.router.add_delete("/api/keys/{key}", self._revoke_key)
        app.router.add_patch("/api/keys/{key}", self._change_key)
        app.router.add_post("/api/keys/{key}/rotate", self._rotate_key)
        app.router.add_get("/api/teams", self._list_teams)
        app.router.add_post("/api/teams", self._create_team)
        app.router.add_get("/api/teams/{team}", self._show_team)
        app.router.add_patch("/api/teams/{team}", self._change_team)
        app.router.add_delete("/api/teams/{team}", self._forget_team)
        app.router.add_get("/api/limits", self._list_limits)
        app.router.add_put("/api/limits", self._set_limit)
        app.router.add_delete("/api/limits", self._unset_limit)
        app.router.add_put("/api/limits/raised", self._raise_limit)
        app.router.add_delete("/api/limits/raised", self._end_raise)
        WebhookPaths(lambda: self._service.webhooks).add_to(app)
        JobPaths(lambda: self._service.jobs).add_to(app)
        return app

    @web.middleware
    async def _door(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Who may enter, and every failure as the API says it."""
        request_id = f"req_{os.urandom(16).hex()}"
        refusal = self._refusal(request)
        if refusal is None:
            try:
                response = await handler(request)
                response.headers["x-request-id"] = request_id
                return response
            except ValueError as error:
                refusal = _Refusal(400, "invalid_request", str(error))
            except tuple(_NOUNS) as error:
                what, where = _NOUNS[type(error)]
                refusal = _Refusal(404, "not_found", f"There is no such {what}: GET {where} lists them.")
            except engines.EngineRefusal as error:
                refusal = _Refusal(409, "engines_refused", f"{error}.")
            except TimeoutError:
                refusal = _Refusal(408, "request_timeout", "The body did not arrive in time.")
            except web.HTTPException as error:
                refusal = _http_refusal(error, request)
            except (StorageError, StoreAwayError) as error:
                refusal = _Refusal(503, "storage_unavailable", str(error))
            except Exception:  # noqa: BLE001 - the last line: no traceback to a client
                _log.exception("a management request failed through a bug", extra={"request_id": request_id})
                refusal = _Refusal(
                    500, "internal_error", f"A bug of Headgate's; the log has it as {request_id}."
                )
        body = envelope("openai", refusal.status, refusal.code, refusal.message, request_id)
        headers = {"x-request-id": request_id, "connection": "close"}
        if refusal.status == 401:
            headers["www-authenticate"] = "Bearer"
        return web.Response(
            status=refusal.status, body=body, content_type="application/json", headers=headers
        )

    def _refusal(self, request: web.Request) -> _Refusal | None:
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            return _Refusal(
                415, "unsupported_encoding", "Send the body as it is, without a content encoding."
            )
        path = request.path
        if path in _OPEN_PATHS or (path == "/metrics" and self._service.has_open_metrics):
            return None
        token = _token(request)
        if not token:
            return _Refusal(
                401, "missing_api_key", "Send an operator key as `Authorization: Bearer op-hg-...`."
            )
        holder = self._keyring.find_operator(token)
        if isinstance(holder, Operator):
            return None
        if holder == "unknown" and isinstance(self._keyring.find(token), Caller):
            return _Refusal(
                403,
                "wrong_plane",
                "This is a caller's key: it belongs to the data plane. The management plane takes operator keys.",
            )
        return _PROBLEMS[holder]

    async def _live(self, _: web.Request) -> web.Response:
        return answer({"status": "ok"})

    async def _ready(self, _: web.Request) -> web.Response:
        if self._service.is_ready:
            return answer({"status": "ok", **self._service.readiness()})
        return answer({"status": "not ready"}, 503)

    async def _metrics(self, _: web.Request) -> web.Response:
        return web.Response(body=await self._service.metrics(), headers={"content-type": CONTENT_TYPE})

    async def _status(self, _: web.Request) -> web.Response:
        return answer(self._service.status())

    async def _costs(self, request: web.Request) -> web.Response:
        by = cast("GroupBy", request.query.get("by", "key"))
        if by not in get_args(GroupBy):
            raise ValueError(f"`by` is one of {', '.join(get_args(GroupBy))}.")
        now = datetime.now(UTC)
        since, until = request.query.get("since"), request.query.get("until")
        period = Period(
            moment_us(since, now) if since is not None else Period().since_us,
            moment_us(until, now) if until is not None else Period().until_us,
        )

        def summed(connection: Connection) -> dict[str, Any]:
            groups = [group._asdict() for group in spend_by(connection, by, period)]
            return {"by": by, "groups": groups, "total": total_spend(connection, period)._asdict()}

        return answer(await self._in_database(summed, may_write=False))

    async def _reload(self, _: web.Request) -> web.Response:
        try:
            result = await self._service.reload()
        except RuntimeError as error:
            return answer({"applied": False, "problems": [str(error)], "needs_restart": []}, 500)
        told = {
            "applied": not result.problems,
            "problems": list(result.problems),
            "needs_restart": list(result.needs_restart),
        }
        return answer(told, 422 if result.problems else 200)

    async def _restart(self, _: web.Request) -> web.Response:
        if self._service.restart():
            return answer({"status": "restarting"}, 202)
        return answer({"status": "a restart is under way"}, 409)

    async def _list_engines(self, _: web.Request) -> web.Response:
        return answer(engines.listed(self._service.engines))

    async def _act_on_engines(self, request: web.Request) -> web.Response:
        action = cast("engines.Action", request.match_info["action"])
        if action not in engines.ACTIONS:
            raise ValueError(f"An action is one of {', '.join(engines.ACTIONS)}.")
        wanted = keys.parse(engines.EngineBody, await read_body(request) or b"{}")
        pool = request.match_info["pool"]
        return answer(engines.carry_out(self._service.engines, pool, action, wanted), 202)

    async def _list_keys(self, request: web.Request) -> web.Response:
        is_all = request.query.get("all", "") not in ("", "0", "false")
        return answer(await self._in_database(lambda c: keys.listed(c, is_all=is_all), may_write=False))

    async def _create_key(self, request: web.Request) -> web.Response:
        wanted = keys.parse(keys.KeyBody, await read_body(request))
        made = await self._in_database(lambda c: keys.create(c, self._pepper, wanted), may_write=True)
        return answer(made, 201)

    async def _show_key(self, request: web.Request) -> web.Response:
        name = request.match_info["key"]
        return answer(await self._in_database(lambda c: keys.shown(c, name), may_write=False))

    async def _revoke_key(self, request: web.Request) -> web.Response:
        name = request.match_info["key"]
        return answer(await self._in_database(lambda c: keys.revoke(c, name), may_write=True))

    async def _rotate_key(self, request: web.Request) -> web.Response:
        name = request.match_info["key"]
        wanted = keys.parse(keys.RotateBody, await read_body(request) or b"{}")
        return answer(
            await self._in_database(lambda c: keys.rotate(c, self._pepper, name, wanted), may_write=True)
        )

    async def _change_key(self, request: web.Request) -> web.Response:
        name = request.match_info["key"]
        wanted = keys.parse(keys.ChangeBody, await read_body(request))
        return answer(await self._in_database(lambda c: keys.change(c, name, wanted), may_write=True))

    async def _list_teams(self, _: web.Request) -> web.Response:
        declared = self._service.declared
        return answer(await self._in_database(lambda c: limits.list_teams(c, declared), may_write=False))

    async def _create_team(self, request: web.Request) -> web.Response:
        wanted, declared = keys.parse(limits.NewTeamBody, await read_body(request)), self._service.declared
        made = await self._in_database(lambda c: limits.create_team(c, declared, wanted), may_write=True)
        return answer(made, 201)

    async def _show_team(self, request: web.Request) -> web.Response:
        name, declared = request.match_info["team"], self._service.declared
        return answer(await self._in_database(lambda c: limits.show_team(c, declared, name), may_write=False))

    async def _change_team(self, request: web.Request) -> web.Response:
        name, declared = request.match_info["team"], self._service.declared
        wanted = keys.parse(limits.TeamBody, await read_body(request))
        return answer(
            await self._in_database(lambda c: limits.change_team(c, declared, name, wanted), may_write=True)
        )

    async def _forget_team(self, request: web.Request) -> web.Response:
        name = request.match_info["team"]
        return answer(await self._in_database(lambda c: limits.forget_team(c, name), may_write=True))

    async def _list_limits(self, _: web.Request) -> web.Response:
        declared = self._service.declared
        return answer(await self._in_database(lambda c: limits.list_limits(c, declared), may_write=False))

    async def _set_limit(self, request: web.Request) -> web.Response:
        wanted = keys.parse(LimitConfig, await read_body(request))
        declared, names = self._service.declared, self._service.declared_key_names
        return answer(
            await self._in_database(lambda c: limits.set_limit(c, declared, names, wanted), may_write=True)
        )

    async def _unset_limit(self, request: web.Request) -> web.Response:
        which, names = (
            keys.parse(limits.LimitName, await read_body(request)),
            self._service.declared_key_names,
        )
        return answer(await self._in_database(lambda c: limits.unset_limit(c, names, which), may_write=True))

    async def _raise_limit(self, request: web.Request) -> web.Response:
        wanted = keys.parse(limits.RaiseBody, await read_body(request))
        declared, names = self._service.declared, self._service.declared_key_names
        return answer(
            await self._in_database(lambda c: limits.raise_limit(c, declared, names, wanted), may_write=True)
        )

    async def _end_raise(self, request: web.Request) -> web.Response:
        which, names = (
            keys.parse(limits.LimitName, await read_body(request)),
            self._service.declared_key_names,
        )
        return answer(await self._in_database(lambda c: limits.end_raise(c, names, which), may_write=True))

    async def _in_database(self, work: Callable[[Connection], Any], *, may_write: bool) -> Any:
        def run() -> Any:
            with database(self._storage / DATABASE_NAME, may_write=may_write) as connection:
                return work(connection)

        return await asyncio.to_thread(run)


def _token(request: web.Request) -> bytes:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        token = request.headers.get("x-api-key", "")
    return token.strip().encode("utf-8", "surrogateescape")


def _http_refusal(error: web.HTTPException, request: web.Request) -> _Refusal:
    if error.status == 404:
        return _Refusal(404, "unknown_url", f"There is nothing at {request.path}.")
    if error.status == 405:
        return _Refusal(405, "method_not_allowed", f"{request.path} does not take {request.method}.")
    if error.status == 413:
        return _Refusal(413, "request_too_large", f"A body has at most {BODY_BYTES} bytes here.")
    return _Refusal(error.status, "http_error", error.reason)


async def _hide_server(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.pop("Server", None)
    response.headers["cache-control"] = "no-store"
