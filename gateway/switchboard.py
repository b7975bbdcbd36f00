"""What engines tell the rest of the service, and ask of it: whose endpoints take requests, how many are there, what went wrong.

Owns the joining of the supervisor's events with workers, metrics, logs and alerts. Refuses to decide anything.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from gateway.alert_delivery import AlertOutbox
from gateway.engine_alerts import alert_of
from gateway.exposition import Page
from gateway.fleet import Fleet
from gateway.patrol import Patrol
from local_engine.scaling import PoolLoad
from local_engine.surroundings import Event
from policies.placement.saturation import saturation

_log = logging.getLogger(__name__)


class Switchboard:
    """One per service. Before `connect` there are no workers, and nobody to tell."""

    def __init__(
        self,
        page: Page,
        alerts: AlertOutbox,
        config_bytes: Callable[[], bytes],
        publish: Callable[[], Awaitable[None]],
    ) -> None:
        """`config_bytes` is what a worker begins with now; `publish` gives all of it to every worker."""
        self._page = page
        self._alerts = alerts
        self._config_bytes = config_bytes
        self._publish = publish
        self._fleet: Fleet | None = None
        self._patrol: Patrol | None = None
        self._publishing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stale = False

    def connect(self, fleet: Fleet, patrol: Patrol) -> None:
        self._fleet, self._patrol = fleet, patrol

    def open_endpoint(self, name: str, *, is_open: bool) -> None:
        if self._fleet is not None and self._patrol is not None:
            self._fleet.amend(self._config_bytes())
            self._patrol.open(name, is_open=is_open)

    async def in_flight(self, endpoints: Sequence[str]) -> int | None:
        return 0 if self._fleet is None else await self._fleet.in_flight(endpoints)

    async def collect(self) -> None:
        if self._fleet is not None:
            await self._fleet.collect()

    def pool_load(self, pool: str, ready: int) -> PoolLoad:
        """From the engines' own pages, some seconds old at most, and the workers' last reports."""
        totals = self._page.totals
        now = time.perf_counter()
        endpoints = self._patrol.endpoints_of(pool) if self._patrol is not None else []
        open_ones = [endpoint for endpoint in endpoints if not endpoint.is_draining]
        fresh = [endpoint for endpoint in open_ones if now < endpoint.fresh_until]
        names = {endpoint.name for endpoint in endpoints}
        return PoolLoad(
            ready=ready,
            waiting=round(totals.gauge("headgate_waiting_requests", {pool}))
            + sum(endpoint.waiting for endpoint in fresh),
            in_flight=round(totals.gauge("headgate_requests_in_flight", names)),
            saturation=sum(saturation(endpoint, now) for endpoint in fresh) / len(fresh) if fresh else 0.0,
        )

    def republish(self) -> None:
        self._is_stale = True
        if self._fleet is not None and (self._publishing is None or self._publishing.done()):
            self._publishing = asyncio.create_task(self._publish_all())

    def engine_event(self, event: Event) -> None:
        kind = event.cause.kind if event.cause is not None else ""
        if event.kind in ("died", "hung", "start_failed"):
            self._page.engines.restarts.labels(event.replica).inc()
            self._page.engines.failures.labels(event.replica, event.kind, kind).inc()
        elif event.kind == "cut":
            _log.warning(
                "requests of an engine are cut: they took longer than its drain",
                extra={"engine": event.replica},
            )
        if event.kind == "crash_looped":
            text = event.cause.text if event.cause is not None else ""
            _log.error(
                "an engine is given up until it is told to try again: %s",
                text,
                extra={"engine": event.replica},
            )
            task = asyncio.create_task(self._alerts.raise_one(alert_of(event, time.time())))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """What was raised is written down."""
        if self._publishing is not None:
            self._publishing.cancel()
            await asyncio.wait({self._publishing})
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _publish_all(self) -> None:
        while self._is_stale:
            self._is_stale = False
            try:
                await self._publish()
            except Exception:  # noqa: BLE001 - the next change publishes again; what is told by name still is
                _log.exception("the addresses of engines could not be given to the workers")
