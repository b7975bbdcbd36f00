"""Builders with defaults, so that a test names only what it is about."""

import msgspec

from backends.dialect import CHAT, Dialect
from backends.json_object import JsonObject, read_object
from backends.placement_config import PlacementConfig
from backends.pool import Endpoint, Pool
from backends.provider import Provider
from backends.transport import ConnectionPool, Deadlines, Origin
from policies.exchange import Caller, Exchange
from policies.placement.registry import placer
from policies.prices import FREE, UNKNOWN, Price
from policies.routing import Model, Target


def a_caller(key_id: str = "k1", team: str = "", models: frozenset[str] | None = None) -> Caller:
    return Caller(key_id, f"name of {key_id}", team, models)


def a_provider(**facts) -> Provider:
    return Provider(**{"name": "acme", "base_url": "http://127.0.0.1:9/v1", **facts})


def an_endpoint(name: str = "pool/0", provider: Provider | None = None, key: str | None = None) -> Endpoint:
    provider = provider or a_provider()
    origin, base_path = Origin.parse(provider.base_url)
    endpoint = Endpoint(name, provider, ConnectionPool(origin), base_path, key, Deadlines())
    endpoint.hash_key = name.encode()  # in these pools all have the same address
    return endpoint


def a_free_price() -> Price:
    return FREE


def an_unknown_price() -> Price:
    return UNKNOWN


def a_model(
    name: str = "demo",
    endpoints: int = 1,
    fallback_endpoints: int = 0,
    price: Price | None = None,
    **placement,
) -> Model:
    """`placement` are settings of a pool's section of that name."""
    price = price or a_free_price()
    targets = []
    for pool_name, size in (("pool", endpoints), ("spare", fallback_endpoints)):
        if size:
            pool = Pool(pool_name, tuple(an_endpoint(f"{pool_name}/{n}") for n in range(size)))
            chooses = placer(PlacementConfig(**placement)) if size > 1 else None
            targets.append(Target(pool_name, pool, name, price, chooses))
    return Model(name, tuple(targets))


def a_document(**body) -> JsonObject:
    """A request's body as the pipeline keeps it."""
    return read_object(msgspec.json.encode({"model": "demo", **body}))


def an_exchange(dialect: Dialect = CHAT, **fields) -> Exchange:
    exchange = Exchange("req_test", dialect, 0.0, 1_700_000_000.0)
    exchange.caller = a_caller()
    for name, value in fields.items():
        setattr(exchange, name, value)
    if exchange.model is not None and not exchange.model_name:
        exchange.model_name = exchange.model.name
    return exchange
