"""A worker's part in watching endpoints: its book of their health, kept up to date, and its words with the parent.

What a worker learns from its own requests it acts on at once and tells the parent, which tells the other workers and
begins to probe; what the parent sees (probes, scrapes, other workers' words) comes back here. Without a parent, as in
tests, the book works all the same: a live request is then the trial. Refuses to know requests.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from backends.config import PoolSettings
from backends.health_config import HealthConfig, ProbeName, ScrapeName
from backends.pool import Pool
from backends.provider import Provider
from gateway.control import EndpointState, Membership, OfHealth, Probed, Scraped, Told
from policies.health.book import HealthBook
from policies.health.endpoint import EndpointHealth
from policies.health.settings import HealthSettings

CHECK_S: Final = 0.25

_log = logging.getLogger(__name__)


class HealthWatch:
    """One per worker. `ejections` are those that this worker decided, by endpoint and reason."""

    def __init__(self) -> None:
        self.book = HealthBook(self._changed)
        self.ejections: dict[tuple[str, str], int] = {}
        self._tell: Callable[[Told], None] | None = None
        self._is_hearsay = False
        self._seen: dict[EndpointHealth, tuple[str, float]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def attach(self, tell: Callable[[Told], None]) -> None:
        """How the parent is reached."""
        self._tell = tell

    def declare(self, pools: Mapping[str, Pool], settings: Iterable[PoolSettings]) -> None:
        """The pools of a configuration that now is in force."""
        self.book.declare(
            (name, health_settings(pool.health, pool.provider), endpoints)
            for pool in settings
            # Who only computes prompts is compared with others that do.
            for name, endpoints in (
                (pool.name, pools[pool.name].endpoints),
                (f"{pool.name} prefill", pools[pool.name].prefillers),
            )
            if endpoints
        )
        self._seen = {health: (health.state, health.out_at) for health in self.book.all()}

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(CHECK_S, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def hear(self, word: OfHealth) -> None:
        """A word from the parent. One of an endpoint that a reload has taken away is late, and dropped."""
        health = self.book.find(word.endpoint)
        if health is None:
            return
        now = time.perf_counter()
        match word:
            case EndpointState():
                self._is_hearsay = True
                if word.state == "out":
                    health.hear_out(now, word.reason, word.for_s)
                else:
                    health.hear_back(now)
                self._is_hearsay = False
            case Probed():
                health.probed(now, word.reason, is_trial=word.is_trial)
            case Membership():
                health.endpoint.is_draining = not word.is_open
                if word.is_open:
                    self._is_hearsay = True
                    health.start_anew(now)
                    self._is_hearsay = False
            case Scraped():
                endpoint = health.endpoint
                endpoint.running, endpoint.waiting = word.running, word.waiting
                endpoint.kv_usage, endpoint.scraped_at = word.kv_usage, now
                endpoint.fresh_until = now + word.fresh_s
                endpoint.in_flight_at_scrape = endpoint.in_flight

    def shares(self) -> dict[str, float]:
        """By endpoint, the share of its requests that it gets: 0 out, 1 whole. For metrics."""
        return {health.endpoint.name: health.endpoint.health for health in self.book.all()}

    def unanswered(self) -> dict[str, float]:
        """By endpoint, attempts that no byte has come of yet. For metrics."""
        return {health.endpoint.name: health.waiting for health in self.book.all()}

    def _check(self) -> None:
        self.start()
        self.book.check(time.perf_counter())

    def _changed(self, health: EndpointHealth) -> None:
        name, state = health.endpoint.name, health.state
        moment = (state, health.out_at)
        if self._seen.get(health, ("up", 0.0)) == moment:
            return  # only a pause
        self._seen[health] = moment
        if state == "out" and not self._is_hearsay:
            key = (name, health.reason)
            self.ejections[key] = self.ejections.get(key, 0) + 1
            _log.warning("an endpoint is left out", extra={"endpoint": name, "reason": health.reason})
        elif state == "warming" and not self._is_hearsay:
            _log.warning("an endpoint is back", extra={"endpoint": name, "reason": health.reason})
        if self._tell is not None:
            # Hearsay, too: who dies takes what it knew along. It ends there, for it changes nothing a second time.
            for_s = health.due_at - health.out_at if state == "out" else 0.0
            self._tell(EndpointState(name, state, health.reason, for_s))


def health_settings(config: HealthConfig, provider: Provider) -> HealthSettings:
    """What the policy wants of it."""
    return HealthSettings(
        failures=config.failures,
        eject_s=config.eject_s,
        eject_max_s=config.eject_max_s,
        slow_start_s=config.slow_start_s,
        slow_factor=config.slow_factor,
        stall_s=config.stall_s,
        has_probe=probe_of(config, provider) != "none",
        retry_share=config.retry_share,
        retry_floor=config.retry_floor,
    )


def probe_of(config: HealthConfig, provider: Provider) -> ProbeName:
    """The probe that is configured, or what this kind of upstream can be asked without costing anybody anything."""
    if config.probe is not None:
        return config.probe
    if provider.metrics_path is not None:
        return "generate"
    return "none" if provider.health_path is None else "health"


def scrape_of(config: HealthConfig, provider: Provider) -> ScrapeName:
    if config.scrape is not None:
        return config.scrape
    return "none" if provider.metrics_path is None else "metrics"
