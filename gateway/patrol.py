"""The parent's eyes on the endpoints: probes of those that are out, scrapes of the engines' own load.

One task for each address, here and not in the workers: what an engine is asked does not grow with their number, and
costs no request anything. What is seen goes to every worker; what a worker says of an endpoint goes to the others.
Refuses to decide: who is out, and for how long, the workers know.
"""

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from prometheus_client import Counter

from backends import probes
from backends.config import PoolSettings
from backends.engine_load import EngineLoad
from backends.engine_rates import EngineHistory
from backends.pool import Endpoint
from gateway.catalog import Upstreams
from gateway.config import Config
from gateway.control import EndpointState, Membership, OfEndpoint, Probed, Scraped
from gateway.health_watch import probe_of, scrape_of
from gateway.kv_feeds import KvFeeds

# A page that is older than so many rounds says nothing about now.
_FRESH_ROUNDS: Final = 3
_JITTER: Final = 0.1
# Beside the control, whose time is that of an endpoint nothing is wrong with.
_LEAST_SLOWER_S: Final = 0.05
_CONTROLS: Final = 3

_log = logging.getLogger(__name__)


class _Beat:
    """One address: its endpoints (one, or its ranks), and what is known of them."""

    def __init__(self, pool: PoolSettings, endpoints: list[Endpoint], model: str) -> None:
        self.pool = pool
        self.endpoints = endpoints
        self.model = model  # to ask it for; empty: no model is served from it
        # By worker and place among the endpoints: who holds it for broken, why, and from when it may be tried.
        self.out: dict[tuple[str, int], tuple[str, float]] = {}
        self.load: Mapping[int, EngineLoad] = {}
        self.history = EngineHistory()
        self.scraped_at = 0.0
        self.last_probe = ""  # how it ended; "ok", or the reason
        self.probed_at = 0.0
        self.task: asyncio.Task[None] | None = None


class Patrol:
    """All addresses of the configuration in force. `tell` reaches every worker but the one named, `wake` who runs engines."""

    def __init__(
        self,
        tell: Callable[[OfEndpoint, str], None],
        probed: Counter,
        feeds: KvFeeds,
        wake: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._tell = tell
        self._feeds = feeds
        self._wake = wake
        self._probed = probed
        self._upstreams = Upstreams()
        self._beats: list[_Beat] = []

    async def apply(self, config: Config) -> None:
        """A configuration whose pools all have addresses. What is known of an address that stays, stays.

        It is in force before anything is awaited: an engine that opens or closes meanwhile is later news.
        """
        known = {id(endpoint): beat for beat in self._beats for endpoint in beat.endpoints}
        before = {beat.endpoints[0] for beat in self._beats}
        standing_down = self._stand_down()
        settings = [*config.enabled_pools().values(), *config.enabled_providers().values()]
        pools = self._upstreams.pools(settings)
        self._beats = []
        for pool in settings:
            model = _model_of(config, pool.name)
            for members in _by_address(pools[pool.name].members):
                beat = _Beat(pool, members, model)
                old = known.get(id(members[0]))
                if old is not None:
                    beat.out, beat.load, beat.scraped_at = old.out, old.load, old.scraped_at
                    beat.history = old.history
                self._beats.append(beat)
                if _is_watched(pool):
                    beat.task = asyncio.create_task(self._walk(beat))
        await standing_down
        await self._feeds.apply(
            endpoint
            for pool in settings
            if pool.placement.kv_events
            for endpoint in pools[pool.name].endpoints
        )
        for endpoint in before - {beat.endpoints[0] for beat in self._beats}:
            await endpoint.connections.close()

    async def stop(self) -> None:
        await self._stand_down()
        await self._feeds.stop()
        await self._upstreams.close()

    def joined(self, worker: str) -> list[OfEndpoint]:
        """What a new worker is to know: it has seen nothing yet."""
        del worker
        now = time.perf_counter()
        members: list[OfEndpoint] = [
            Membership(endpoint.name, not endpoint.is_draining)
            for beat in self._beats
            if beat.pool.members
            for endpoint in beat.endpoints
        ]
        return (
            members
            + [
                EndpointState(beat.endpoints[place].name, "out", reason, max(0.0, due_at - now))
                for beat in self._beats
                for (_, place), (reason, due_at) in beat.out.items()
            ]
            + self._feeds.joined()
        )

    def heard(self, worker: str, word: EndpointState) -> None:
        """What a worker thinks of an endpoint."""
        for beat in self._beats:
            for place, endpoint in enumerate(beat.endpoints):
                if endpoint.name == word.endpoint:
                    if word.state == "out":
                        beat.out[worker, place] = (word.reason, time.perf_counter() + word.for_s)
                    else:
                        beat.out.pop((worker, place), None)
                    self._tell(word, worker)

    def wanted(self, pool: str) -> None:
        """Somebody waits for a pool of which no endpoint takes requests."""
        self._wake(pool)

    def open(self, name: str, *, is_open: bool) -> None:
        """An engine of ours takes requests from now on, or none any more. Every worker hears it."""
        for beat in self._beats:
            for endpoint in beat.endpoints:
                if endpoint.name == name:
                    endpoint.is_draining = not is_open
                    if is_open:
                        beat.out.clear()
        self._tell(Membership(name, is_open), "")

    def endpoints_of(self, pool: str) -> list[Endpoint]:
        """As this process sees them: with what was scraped of them, and nothing in flight."""
        return [endpoint for beat in self._beats if beat.pool.name == pool for endpoint in beat.endpoints]

    def left(self, worker: str) -> None:
        for beat in self._beats:
            for key in [key for key in beat.out if key[0] == worker]:
                del beat.out[key]

    def view(self) -> list[dict[str, Any]]:
        """For operators: by endpoint its state, why, how its last probe ended, its load and how old that is."""
        now = time.perf_counter()
        return [
            {
                "name": endpoint.name,
                "state": "closed" if endpoint.is_draining else "out" if reasons else "up",
                "reason": reasons[0] if reasons else "",
                "out_in_workers": len(reasons),
                "last_probe": beat.last_probe,
                "running": load.running if load is not None else None,
                "waiting": load.waiting if load is not None else None,
                "kv_usage": round(load.kv_usage, 3) if load is not None else None,
                "load_age_s": round(now - beat.scraped_at, 1) if load is not None else None,
                **_rates_of(beat, endpoint),
                **self._feeds.view(endpoint),
            }
            for beat in self._beats
            for place, endpoint in enumerate(beat.endpoints)
            for load in [_load_of(beat, endpoint)]
            for reasons in [[reason for (_, at), (reason, _) in beat.out.items() if at == place]]
        ]

    async def _walk(self, beat: _Beat) -> None:
        """Rounds for as long as the configuration stands. Not in step with those of other addresses."""
        health = beat.pool.health
        probe = probe_of(health, beat.pool.provider)
        while True:
            is_trial = bool(beat.out) and probe != "none"
            pause_s = health.probe_every_s if is_trial else health.scrape_every_s
            await asyncio.sleep(pause_s * (1 + _JITTER * (2 * random.random() - 1)))  # noqa: S311 - only jitter, no secret
            if all(endpoint.is_draining for endpoint in beat.endpoints):
                continue  # whoever runs it looks after it
            try:
                if beat.out and probe != "none":
                    await self._try(beat, is_page=probe == "health" or not beat.model)
                else:
                    await self._look(beat)
            except Exception:  # noqa: BLE001 - one bad round must not be the last one
                _log.exception("a look at an endpoint failed through a bug")

    async def _try(self, beat: _Beat, *, is_page: bool) -> None:
        """The trial of one that is out."""
        endpoint, health = beat.endpoints[0], beat.pool.health
        ended = await self._ask(beat, endpoint, is_page=is_page)
        reason = ended.reason
        if not reason and any(why == "slow" for why, _ in beat.out.values()):
            control = self._control(beat)
            if control is not None:
                # The least of a few: whatever else the machines do only adds to it.
                others = [
                    await self._ask(control, control.endpoints[0], is_page=is_page) for _ in range(_CONTROLS)
                ]
                usual_s = min(other.took_s for other in others)
                if ended.took_s > max(usual_s * health.slow_factor / 2, usual_s + _LEAST_SLOWER_S):
                    reason = "slow"
        beat.last_probe, beat.probed_at = reason or "ok", time.perf_counter()
        for each in beat.endpoints:
            self._probed.labels(each.name, "bad" if reason else "ok").inc()
            self._tell(Probed(each.name, reason, is_trial=True), "")

    async def _ask(self, beat: _Beat, endpoint: Endpoint, *, is_page: bool) -> probes.Probe:
        timeout_s = beat.pool.health.probe_timeout_s
        if is_page:
            return await probes.look(endpoint, endpoint.provider.health_path or "/health", timeout_s)
        return await probes.generate(endpoint, beat.model, timeout_s)

    def _control(self, beat: _Beat) -> _Beat | None:
        """Another of the pool, with which nothing is known to be wrong."""
        return next(
            (other for other in self._beats if other.pool.name == beat.pool.name and not other.out), None
        )

    async def _look(self, beat: _Beat) -> None:
        """At the load of one that is up, which tells as well that it lives."""
        endpoint, health = beat.endpoints[0], beat.pool.health
        scrape = scrape_of(health, beat.pool.provider)
        if scrape == "none":
            ended = await probes.look(
                endpoint, endpoint.provider.health_path or "/health", health.probe_timeout_s
            )
            self._tell_look(beat, ended.reason)
            return
        path = endpoint.provider.metrics_path or "/metrics" if scrape == "metrics" else "/load"
        ended, loads = await probes.load(endpoint, path, health.probe_timeout_s)
        # A page that is not there, or not for us, says nothing about the engine.
        self._tell_look(beat, "" if 300 <= ended.status < 500 else ended.reason)
        if not loads.now:
            return
        beat.load, beat.scraped_at = loads.now, time.perf_counter()
        beat.history.observe(beat.scraped_at, loads.totals)
        for each in beat.endpoints:
            load = _load_of(beat, each)
            if load is not None:
                self._feeds.worked(each, beat.history.latest(each.rank), load.running + load.waiting)
                fresh_s = _FRESH_ROUNDS * health.scrape_every_s
                each.running, each.waiting, each.kv_usage = load.running, load.waiting, load.kv_usage
                each.scraped_at, each.fresh_until = beat.scraped_at, beat.scraped_at + fresh_s
                self._tell(Scraped(each.name, load.running, load.waiting, load.kv_usage, fresh_s), "")

    def _tell_look(self, beat: _Beat, reason: str) -> None:
        beat.last_probe, beat.probed_at = reason or "ok", time.perf_counter()
        for each in beat.endpoints:
            self._tell(Probed(each.name, reason), "")

    def _stand_down(self) -> asyncio.Future[list[BaseException | None]]:
        """No look is taken from now on; to be awaited for the end of the last one."""
        tasks = [beat.task for beat in self._beats if beat.task is not None]
        for task in tasks:
            task.cancel()
        return asyncio.gather(*tasks, return_exceptions=True)


def _by_address(endpoints: tuple[Endpoint, ...]) -> list[list[Endpoint]]:
    """The ranks behind one address are asked together."""
    found: dict[tuple[object, str], list[Endpoint]] = {}
    for endpoint in endpoints:
        found.setdefault((endpoint.connections.origin, endpoint.base_path), []).append(endpoint)
    return list(found.values())


def _load_of(beat: _Beat, endpoint: Endpoint) -> EngineLoad | None:
    """A rank has its own; an address without ranks has the sum of whatever is behind it."""
    if endpoint.rank is not None:
        return beat.load.get(endpoint.rank)
    whole: EngineLoad | None = None
    for load in beat.load.values():
        whole = load if whole is None else whole + load
    return whole


def _rates_of(beat: _Beat, endpoint: Endpoint) -> dict[str, Any]:
    """For operators: over the last seconds, by the engine's own count; empty if it does not count."""
    rates = beat.history.rates(endpoint.rank)
    if rates is None:
        return {}
    return {
        "prompt_tokens_per_s": round(rates.prompt_tokens_per_s, 1),
        "generation_tokens_per_s": round(rates.generation_tokens_per_s, 1),
        "hit_rate": None if rates.hit_rate is None else round(rates.hit_rate, 3),
    }


def _is_watched(pool: PoolSettings) -> bool:
    """Whether there is anything to look at, or to ask."""
    return probe_of(pool.health, pool.provider) != "none" or scrape_of(pool.health, pool.provider) != "none"


def _model_of(config: Config, upstream: str) -> str:
    """A model that is served from there, by its name there; empty: none is."""
    for name, targets in config.served_models().items():
        for target in targets:
            if target.upstream == upstream:
                return target.model or name
    return ""
