"""From the configuration to what can be sent to: endpoints, pools, models, the catalog.

Endpoints whose settings did not change survive a reload with their connections and their load; the others are
forgotten, and close their connections when they have been idle. Knows no provider by name.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from backends.config import PoolSettings
from backends.health_config import HealthConfig
from backends.member import Member
from backends.orca import Orca
from backends.placement_config import PlacementConfig
from backends.pool import Endpoint, Pool
from backends.prefill_config import PrefillConfig
from backends.transport import ConnectionPool, Deadlines, Origin
from gateway.cache_watch import CacheWatch
from gateway.config import Config, TargetConfig
from policies import price_catalogue
from policies.placement.block_index import BlockIndex
from policies.placement.placer import Placer
from policies.placement.prefill import Prefillers
from policies.placement.registry import placer
from policies.prices import UNKNOWN, Price, PriceBook, PriceConfig
from policies.routing import Catalog, Model, Target

# Names resolved by a wildcard are a client's to choose: remember few of them.
_MAX_RESOLVED: Final = 1024


class Upstreams:
    """The endpoints in use, by pool and address, and those that are not but have requests. One per worker."""

    def __init__(self, processes: int = 1, place: int = 0) -> None:
        """`processes`: how many of ours, each with Upstreams of its own, send to the same endpoints; `place`: which this is."""
        self._endpoints: dict[tuple[str, str, int | None], tuple[PoolSettings, Endpoint]] = {}
        self._leaving: list[Endpoint] = []
        self._processes = processes
        self._place = place

    def pools(self, settings: Iterable[PoolSettings]) -> dict[str, Pool]:
        """The pools of this configuration, by name; endpoints of others are dropped."""
        kept: dict[tuple[str, str, int | None], tuple[PoolSettings, Endpoint]] = {}
        pools: dict[str, Pool] = {}
        for pool in settings:
            # Another replica in the list changes nothing for this one, nor does how it is chosen.
            shared = replace(
                pool,
                base_urls=(),
                weights=(),
                roles=(),
                members=(),
                placement=PlacementConfig(),
                health=HealthConfig(),
                prefill=PrefillConfig(),
            )
            members = pool.all_members()
            for member in members:
                key = (pool.name, member.base_url, member.rank)
                known = self._endpoints.get(key)
                own = _own(shared, member)
                if known is not None and known[0] == own:
                    endpoint = known[1]
                    endpoint.name = member.name
                else:
                    endpoint = _endpoint(own, member)
                if pool.members:
                    # Whoever named it will name the one that follows it so, at whatever address.
                    endpoint.hash_key = member.name.encode()
                endpoint.weight = member.weight
                endpoint.is_draining = not member.is_open
                endpoint.max_in_flight = pool.placement.max_in_flight
                endpoint.max_waiting = pool.placement.max_waiting
                endpoint.processes = self._processes
                endpoint.place = self._place
                endpoint.orca = _orca(pool.health)
                kept[key] = (own, endpoint)
            built = [(m.role, kept[pool.name, m.base_url, m.rank][1]) for m in members]
            pools[pool.name] = Pool(
                pool.name,
                tuple(endpoint for role, endpoint in built if role != "prefill"),
                is_salted=pool.is_salted,
                priority=pool.priority,
                prefillers=tuple(endpoint for role, endpoint in built if role == "prefill"),
            )
        staying = {endpoint for _, endpoint in kept.values()}
        self._leaving = [
            endpoint
            for endpoint in (*self._leaving, *self.endpoints())
            if endpoint.in_flight and endpoint not in staying
        ]
        self._endpoints = kept
        return pools

    def in_flight(self, names: Iterable[str]) -> int:
        """Requests of this process at endpoints of these names, also at those that a reload has replaced."""
        wanted = set(names)
        return sum(e.in_flight for e in (*self._leaving, *self.endpoints()) if e.name in wanted)

    def endpoints(self) -> list[Endpoint]:
        return [endpoint for _, endpoint in self._endpoints.values()]

    async def close(self) -> None:
        for endpoint in self.endpoints():
            await endpoint.connections.close()


class Placers:
    """What remembers where the sessions of each pool's models are. One per worker, for its whole life."""

    def __init__(self, caches: CacheWatch | None = None) -> None:
        """`caches`: what is known of the engines' caches, where pools follow it."""
        self._caches = caches
        self._placers: dict[tuple[str, str], tuple[PlacementConfig, Placer]] = {}
        self._prefillers: dict[tuple[str, str], tuple[PlacementConfig, Placer]] = {}

    def find(self, pool: Pool, settings: PlacementConfig, upstream_model: str) -> Placer | None:
        """None where there is no choice. Other settings make another, which remembers nothing."""
        if len(pool.endpoints) < 2 and not pool.prefillers:
            return None
        known = self._placers.get((pool.name, upstream_model))
        if known is None or known[0] != settings:
            known = self._placers[pool.name, upstream_model] = (
                settings,
                placer(settings, self.blocks(pool)),
            )
        return known[1]

    def blocks(self, pool: Pool) -> BlockIndex | None:
        return None if self._caches is None else self._caches.index(pool.name)

    def prefillers(
        self, pool: Pool, settings: PlacementConfig, prefill: PrefillConfig, upstream_model: str
    ) -> Prefillers | None:
        """None where every prompt is computed where it is answered."""
        if not pool.prefillers:
            return None
        by_prefix = settings.model_copy(update={"policy": "prefix"})
        known = self._prefillers.get((pool.name, upstream_model))
        if known is None or known[0] != by_prefix:
            known = self._prefillers[pool.name, upstream_model] = (by_prefix, placer(by_prefix))
        return Prefillers(pool.prefillers, known[1], prefill)


def _orca(health: HealthConfig) -> Orca | None:
    return None if health.load_header is None else Orca(health.load_header, health.load_header_every_s)


def _own(pool: PoolSettings, member: Member) -> PoolSettings:
    """With the member's own key, where its engine was started with one."""
    return pool if member.api_key is None else replace(pool, api_key=member.api_key.get_secret_value())


def _endpoint(pool: PoolSettings, member: Member) -> Endpoint:
    origin, base_path = Origin.parse(
        member.base_url, proxy=pool.proxy, ca_file=pool.ca_file, verify=pool.verify
    )
    connections = ConnectionPool(origin)
    endpoint = Endpoint(member.name, pool.provider, connections, base_path, pool.api_key, pool.deadlines)
    endpoint.take_keys(pool.more_api_keys)
    if member.rank is not None:
        endpoint.be_rank(member.rank)
    return endpoint


class CatalogBuilder:
    """Builds the catalog of one configuration. Prices are looked up once per target, here."""

    def __init__(
        self,
        config: Config,
        pools: Mapping[str, Pool],
        prices: PriceBook,
        now_time: int,
        placers: Placers | None = None,
    ) -> None:
        self._placers = placers or Placers()
        self._config = config
        self._pools = pools
        self._prices = prices
        self._now_time = now_time
        self._providers = config.enabled_providers()
        self._resolved: OrderedDict[str, Model] = OrderedDict()

    def catalog(self) -> Catalog:
        """The models that are declared, then `{provider}/{model}` of what each enabled provider is known to have."""
        models: dict[str, Model] = {}
        for name, targets in self._config.served_models().items():
            declared = self._config.models[name]
            built = tuple(self._target(name, target, declared.price) for target in targets)
            for each in built:
                each.async_price = each.price.scaled(declared.async_price_factor)
            for public in (name, *declared.aliases):
                models[public] = Model(public, built, created_time=self._now_time)
                models[public].on_full = declared.on_full or ""
        for provider, settings in self._providers.items():
            for upstream in price_catalogue.names(settings.provider.prices or ""):
                name = f"{provider}/{upstream}"
                if name not in models and _offers(settings, upstream):
                    models[name] = self._wildcard(name, provider, upstream)
        return Catalog(models.values(), self._resolve)

    def passthrough(self) -> dict[str, Model]:
        """By provider name, the model that stands for all of a provider's own paths."""
        return {
            name: Model(f"{name}/*", (Target(name, self._pools[name], "*", UNKNOWN),))
            for name, settings in self._providers.items()
            if settings.passthrough
        }

    def _target(self, name: str, target: TargetConfig, price: PriceConfig | None) -> Target:
        upstream_model = target.model or name
        pool = self._pools[target.upstream]
        built = Target(
            target.upstream,
            pool,
            upstream_model,
            self._price(target.upstream, upstream_model, target.price or price),
            self._placers.find(pool, self._placement(target.upstream), upstream_model),
        )
        settings = self._config.pools.get(target.upstream)
        if settings is not None:
            built.prefillers = self._placers.prefillers(
                pool, settings.placement, settings.prefill, upstream_model
            )
        if built.placer is not None:
            built.blocks = self._placers.blocks(pool)
            built.patience_s = self._placement(target.upstream).tokenize_timeout_s
        if target.deadlines is not None:
            built.deadlines = target.deadlines.over(self._deadlines(target.upstream))
        return built

    def _deadlines(self, upstream: str) -> Deadlines:
        """What its endpoints have, whether there are any now or not."""
        pool = self._config.pools.get(upstream)
        return pool.deadlines.resolve() if pool is not None else self._providers[upstream].deadlines

    def _placement(self, upstream: str) -> PlacementConfig:
        pool = self._config.pools.get(upstream)
        return pool.placement if pool is not None else PlacementConfig()

    def _price(self, upstream: str, upstream_model: str, declared: PriceConfig | None) -> Price:
        provider = self._providers.get(upstream)
        declared = declared or self._override(upstream, upstream_model)
        return self._prices.price(provider.provider.prices if provider else None, upstream_model, declared)

    def _override(self, upstream: str, upstream_model: str) -> PriceConfig | None:
        """The longest match among `prices.overrides`."""
        name = f"{upstream}/{upstream_model}"
        overrides = self._config.prices.overrides
        if name in overrides:
            return overrides[name]
        matching = [p for p in overrides if p.endswith("*") and name.startswith(p[:-1])]
        return overrides[max(matching, key=len)] if matching else None

    def _resolve(self, name: str) -> Model | None:
        """A name the catalog does not list: `{provider}/{model}`, or a bare name that one provider is known to have."""
        found = self._resolved.get(name)
        if found is not None:
            self._resolved.move_to_end(name)
            return found
        provider, slash, upstream = name.partition("/")
        settings = self._providers.get(provider) if slash else None
        if settings is not None and upstream and _offers(settings, upstream):
            model = self._wildcard(name, provider, upstream)
        else:
            owner = self._owner(name)
            if owner is None:
                return None
            model = self._wildcard(name, owner, name)
        self._resolved[name] = model
        if len(self._resolved) > _MAX_RESOLVED:
            self._resolved.popitem(last=False)
        return model

    def _owner(self, upstream_model: str) -> str | None:
        """The first enabled provider whose public price list has this model."""
        for name, settings in self._providers.items():
            if (
                _offers(settings, upstream_model)
                and self._prices.price(settings.provider.prices, upstream_model) != UNKNOWN
            ):
                return name
        return None

    def _wildcard(self, name: str, provider: str, upstream_model: str) -> Model:
        price = self._price(provider, upstream_model, None)
        target = Target(provider, self._pools[provider], upstream_model, price)
        return Model(name, (target,), owner=provider, created_time=self._now_time)


def _offers(settings: PoolSettings, upstream_model: str) -> bool:
    return settings.models is None or upstream_model in settings.models
