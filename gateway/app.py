"""The composition root of a worker: from a Config to something that serves. The only file that builds things.

A reload builds a new Runtime and swaps it in one assignment; what lives longer than a configuration (connections,
ledger, keyring, sessions' secret) is made once.
"""

import asyncio
import dataclasses
import functools
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from gateway.alerts import Alerts
from gateway.answer_storage import open_answers
from gateway.cache_watch import CacheWatch
from gateway.catalog import CatalogBuilder, Placers, Upstreams
from gateway.config import Config
from gateway.control import BlocksHeld, OfEndpoint, Told
from gateway.end_user import EndUsers
from gateway.endpoints.context import Context, new_request_id
from gateway.errors import edge_answer
from gateway.health_metrics import watch_health
from gateway.health_watch import HealthWatch
from gateway.idempotency import Idempotency
from gateway.inbound import Limits, Server
from gateway.jsonl import JsonlLog
from gateway.keys import Keyring, load_pepper
from gateway.leases import Leases
from gateway.ledger import Ledger
from gateway.limit_storage import LimitStorage
from gateway.logs import AccessLog
from gateway.overflow.worker_queue import Surroundings, WorkerQueue
from gateway.pinning import Pinning
from gateway.pipeline import Parts, Pipeline
from gateway.placement_metrics import watch_caches, watch_placement
from gateway.placing import Placing
from gateway.prefilling import watch_prefills
from gateway.prompt_tokens import PromptTokens
from gateway.route_builder import rules_of
from gateway.routes import UPLOAD_PATHS, route
from gateway.runtime import Runtime
from gateway.sending import Sending
from gateway.settle import Settler
from gateway.shadowing import Shadowing
from gateway.telemetry import Telemetry
from gateway.tenants import Declared, Tenants, TenantsWatch
from gateway.waiting_room import WaitingRoom
from gateway.waking import Waking
from policies.exchange import Exchange
from policies.limits.book import LimitBook
from policies.limits.holding import Holding
from policies.limits.limit import Limit
from policies.limits.policy import Limits as LimitsPolicy
from policies.placement.priority import ceilings
from policies.policy import Hooks
from policies.prices import PriceBook
from policies.registry import policies
from policies.rules.rule import Rules
from policies.session import session_secret

# Of a form around an uploaded file.
_FORM_BYTES: Final = 65_536
# How long requests that were cut may take to say so to their clients and settle.
_CUT_S: Final = 5.0


class App:
    """One worker's application. StorageError when the storage directory cannot be used."""

    def __init__(self, config: Config, name: str, telemetry: Telemetry, access_log: AccessLog) -> None:
        storage = Path(config.storage.directory)
        self._telemetry = telemetry
        self._prices = PriceBook()
        self._upstreams = Upstreams(_workers(config), _slot(name))
        self._caches = CacheWatch()
        self._placers = Placers(self._caches)
        self._prompt_tokens = PromptTokens()
        self._health = HealthWatch()
        self._room = WaitingRoom(config.overload.classes())
        self._waking = Waking()
        pepper = load_pepper(storage, config.pepper())
        self._session_secret = session_secret(pepper)
        self._keyring = Keyring(storage, pepper, config.declared_keys())
        self._config = config
        self._loop, self._thread_id = asyncio.get_running_loop(), threading.get_ident()
        self._holding = Holding(
            lambda: f"{name}-{secrets.token_hex(6)}", ttl_us=int(config.limits.lapse_s * 1e6)
        )
        self._limit_storage = LimitStorage(config.storage)
        self._alerts = Alerts(storage)
        self._leases = Leases(self._limit_storage.open, self._holding, self._alerts.observe)
        self._limits: LimitsPolicy | None = None
        self._rules: Rules | None = None
        self._ledger = Ledger(
            storage,
            name,
            is_full_sync=config.storage.synchronous == "full",
            jsonl=_jsonl(config, name),
            slots=config.ledger.intents,
        )
        pinning = Pinning(storage)
        on_room = self._room_freed if config.queue.enabled else self._room.ended
        self._settler = Settler(self._ledger, telemetry, access_log, name, on_room, pinning.origins.learn)
        self._idempotency = Idempotency(open_answers(config))
        self._sending = Sending(self._settler)
        self._shadowing = Shadowing(self._sending, self._settler, telemetry)
        self._queue = self._open_queue(name, pepper) if config.queue.enabled else None
        spill = self._queue.spill if self._queue is not None else None
        parts = Parts(
            self._idempotency,
            self._leases,
            pinning,
            self._prompt_tokens,
            Placing(self._room, spill.park if spill is not None else None, want=self._waking.want),
            self._sending,
            self._shadowing,
            self._settler,
            spill,
            self._queue.background if self._queue is not None else None,
        )
        self._pipeline = Pipeline(lambda: self._context.runtime, parts)
        doors = self._queue.doors if self._queue is not None else None
        self._context = Context(self._pipeline, self._build(config), doors=doors)
        self.server = Server(functools.partial(route, self._context), _refuse, _limits(config))
        self._tenants = TenantsWatch(storage, _declared(config), self._use_tenants)
        self._watch()
        self._watch_limits()

    @property
    def open_connections(self) -> int:
        return self.server.open_connections

    def attach(self, tell: Callable[[Told], None]) -> None:
        self._health.attach(tell)
        self._waking.attach(tell)

    def hear(self, word: OfEndpoint) -> None:
        if isinstance(word, BlocksHeld):
            self._caches.hear(word)
        else:
            self._health.hear(word)

    def in_flight(self, endpoints: list[str]) -> int:
        return self._upstreams.in_flight(endpoints)

    async def start(self) -> None:
        self._health.start()
        if self._queue is not None:
            self._queue.start()
        self._context.is_ready = True

    def reload(self, config: Config) -> None:
        """The new configuration, whole or not at all; requests under way keep the old one."""
        runtime = self._build(config)
        self._room.configure(config.overload.classes())
        self._keyring.declare(config.declared_keys())
        self._config = config
        self._tenants.declare(_declared(config))
        self._context.runtime = dataclasses.replace(runtime, hooks=self._hooks())
        if self._queue is not None:
            self._queue.configured()

    def draw(self, *, is_on: bool) -> None:
        if self._queue is not None:
            self._queue.drawing.pause(is_paused=not is_on)

    def unready(self) -> None:
        self._context.is_ready = False

    def announce_drain(self) -> None:
        self.server.announce_drain()

    async def drain(self, timeout_s: float) -> int:
        """Lets what is open end, then cuts the rest: an error in band, and settlement. Returns how many were cut."""
        self.server.stop_keepalive()
        queue, until_at = self._queue, self._loop.time() + timeout_s
        if queue is not None:
            queue.close()
        left = await self.server.wait_closed(timeout_s)
        if left:
            self.server.cancel_all()
            await self.server.wait_closed(_CUT_S)
            self.server.abort_all()
        if queue is not None:
            await queue.drain(max(0.0, until_at - self._loop.time()))
        await self._shadowing.stop()
        await self._sending.prefilling.stop()
        await self._settler.idle()
        return left

    async def stop(self) -> None:
        self._health.stop()
        if self._queue is not None:
            await self._queue.stop()
        self._settler.stop()
        await self._leases.stop()
        await asyncio.to_thread(self._alerts.close)
        await self._upstreams.close()
        await self._idempotency.close()
        await self._ledger.stop()
        await asyncio.to_thread(self._keyring.close)
        await asyncio.to_thread(self._tenants.close)

    def _use_tenants(self, tenants: Tenants) -> None:
        """Teams and limits changed, in the configuration or the database. Any thread."""
        self._keyring.use_teams(tenants.teams)
        if threading.get_ident() == self._thread_id:
            self._use_limits(tenants.limits)
        else:
            self._loop.call_soon_threadsafe(self._use_limits, tenants.limits)

    def _use_limits(self, limits: Sequence[Limit]) -> None:
        """From the next request on. Without any the policy is not there at all."""
        self._limits = None
        settings = self._config.limits
        self._holding.over_admission = settings.over_admission
        self._alerts.configure(self._config.alerts)
        if limits:
            self._leases.start()
            self._limits = LimitsPolicy(
                LimitBook(limits),
                self._holding,
                self._leases.wake,
                default_output_tokens=settings.output_tokens,
            )
        self._context.runtime = dataclasses.replace(self._context.runtime, hooks=self._hooks())

    def _open_queue(self, name: str, pepper: bytes) -> WorkerQueue:
        queue = WorkerQueue(
            name,
            Surroundings(
                config=lambda: self._config,
                runtime=lambda: self._context.runtime,
                handle=lambda *request: self._pipeline.handle(*request),  # noqa: PLW0108 - it is made after the queue
                settler=self._settler,
                ledger=self._ledger,
                waiting=self._room.sizes,
                want=self._waking.want,
                budget_used=self._budget_used,
                processes=_workers(self._config),
                pepper=pepper,
            ),
        )
        queue.watch_metrics(self._telemetry)
        return queue

    def _room_freed(self, pool: str, after_s: float) -> None:
        """A request has left an endpoint of this pool: whoever waits in memory first."""
        self._room.ended(pool, after_s)
        if self._queue is not None:
            self._queue.room_freed()

    def _hooks(self) -> Hooks:
        is_blocking = self._config.prices.unknown == "block"
        return Hooks(policies(blocks_unpriced=is_blocking, rules=self._rules, limits=self._limits))

    def _budget_used(self, exchange: Exchange) -> float:
        return self._limits.budget_used(exchange) if self._limits is not None else 0.0

    def _build(self, config: Config) -> Runtime:
        settings = [*config.enabled_pools().values(), *config.enabled_providers().values()]
        pools = self._upstreams.pools(settings)
        self._caches.declare({pool.name: pools[pool.name] for pool in settings if pool.placement.kv_events})
        builder = CatalogBuilder(config, pools, self._prices, int(time.time()), self._placers)
        classes = config.overload.classes()
        catalog = builder.catalog()
        self._rules = rules_of(config, catalog, self._telemetry.rule_outcomes, self._budget_used)
        self._telemetry.list_models(model.name for model in catalog.models())
        self._health.declare(pools, settings)
        return Runtime(
            catalog=catalog,
            hooks=self._hooks(),
            health=self._health.book,
            keyring=self._keyring,
            passthrough=builder.passthrough(),
            session_headers=tuple(name.encode() for name in config.sessions.headers),
            session_names=frozenset(name.encode() for name in config.sessions.headers),
            session_secret=self._session_secret,
            ceilings=ceilings(classes),
            body_bytes=config.server.limits.body_bytes,
            response_bytes=config.server.limits.response_bytes,
            idempotency=config.idempotency,
            end_users=EndUsers(config.limits.end_users),
            takes_flex=config.queue.enabled,
        )

    def _watch(self) -> None:
        """What others count already, for the metrics page."""
        watch, health = self._telemetry.watch, self._ledger.health
        self._limit_storage.watch(self._telemetry)
        watch(
            "headgate_ledger_rows_total",
            "counter",
            "Ledger rows, by what became of them.",
            lambda: {"written": health().rows_written, "lost": health().rows_lost},
            "outcome",
        )
        watch(
            "headgate_ledger_flush_failures_total",
            "counter",
            "Commits of ledger rows that failed and were tried again.",
            lambda: health().flush_failures,
        )
        watch(
            "headgate_ledger_backlog_rows",
            "gauge",
            "Ledger rows that wait to be written.",
            lambda: health().backlog,
        )
        watch(
            "headgate_intent_slots_missed_total",
            "counter",
            "Requests that had no intent because all slots were taken: raise ledger.intents.",
            lambda: health().slots_missed,
        )
        watch(
            "headgate_keyring_refresh_failures_total",
            "counter",
            "Times the keys could not be read from the database; the last known set stood.",
            lambda: self._keyring.refresh_failures,
        )
        watch(
            "headgate_connections",
            "gauge",
            "Open client connections.",
            lambda: self.server.open_connections,
        )
        watch(
            "headgate_requests_in_flight",
            "gauge",
            "Requests at an endpoint now.",
            lambda: {endpoint.name: endpoint.in_flight for endpoint in self._upstreams.endpoints()},
            "endpoint",
        )
        watch_health(self._telemetry, self._health, self._sending.counts, self._settler.wasted_nanousd)
        watch_prefills(self._telemetry, self._sending.prefilling.counts)
        watch_placement(self._telemetry, self._settler.locality, self._room, self._upstreams.endpoints)
        watch_caches(self._telemetry, self._settler.locality, self._prompt_tokens.counts, self._caches.held)
        watch(
            "headgate_upstream_connections",
            "gauge",
            "Open connections to an endpoint.",
            lambda: {e.name: e.connections.open_connections for e in self._upstreams.endpoints()},
            "endpoint",
        )

    def _watch_limits(self) -> None:
        watch = self._telemetry.watch
        watch(
            "headgate_limit_updates_total",
            "counter",
            "Conversations with the store of limits; where there are nearly as many as requests, limits have no slack.",
            lambda: self._leases.updates,
        )
        watch(
            "headgate_limit_failures_total",
            "counter",
            "Times the store of limits did not answer a worker.",
            lambda: self._leases.failures,
        )
        watch(
            "headgate_limit_lapses_total",
            "counter",
            "Times the store of limits had given a worker up, or forgotten it.",
            lambda: self._holding.forgotten,
        )


def _declared(config: Config) -> Declared:
    return config.declared()


def _slot(name: str) -> int:
    """Of a worker, by its name (`w0-3`): which of those that run at once it is."""
    slot = name.partition("-")[0].removeprefix("w")
    return int(slot) if slot.isdecimal() else 0


def _workers(config: Config) -> int:
    """How many of us there are; the parent has resolved `auto`."""
    return config.server.workers if isinstance(config.server.workers, int) else 1


def _jsonl(config: Config, name: str) -> JsonlLog | None:
    """One file for each worker slot: two processes never write the same one for long."""
    settings = config.ledger.jsonl
    if settings is None:
        return None
    slot = name.partition("-")[0]
    path = settings.path.with_name(f"{settings.path.name}.{slot}")
    return JsonlLog(path, max_bytes=settings.rotate_bytes, keep=settings.keep)


def _limits(config: Config) -> Limits:
    limits, files = config.server.limits, config.queue.files
    return Limits(
        header_bytes=limits.header_bytes,
        header_count=limits.header_count,
        target_bytes=limits.target_bytes,
        body_bytes=limits.body_bytes,
        header_s=limits.header_s,
        idle_s=limits.idle_s,
        body_s=limits.body_s,
        write_stall_s=limits.write_stall_s,
        connections=limits.connections,
        pipelined_bytes=limits.pipelined_bytes,
        upload_paths=frozenset(UPLOAD_PATHS) if config.queue.enabled else frozenset(),
        upload_bytes=files.file_bytes + _FORM_BYTES,
    )


def _refuse(status: int, code: str, message: str, path: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """What the edge answers before routing."""
    return edge_answer(status, code, message, path, new_request_id())
