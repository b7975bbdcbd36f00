"""Rendezvous hashing with a bounded load: where sessions live.

Every process ranks the endpoints by hash(session, endpoint) and so agrees with all others without shared state;
when an endpoint goes, only its own sessions move, each to its own second choice (Thaler and Ravishankar, 1998).
With weights the score is -weight / ln(hash), so that a change of weight moves no more than its share. The bound
(Mirrokni, Thorup, Zadimoghaddam, 2016) caps an endpoint at `factor` times its share of the pool's load; what is
above walks the session's own order, not one neighbour's, so that overflow does not cascade.
"""

from collections.abc import Sequence
from math import log
from typing import Final

import xxhash

from backends.load import LEAST_HEALTH, EndpointLoad

_hash = xxhash.xxh3_64_intdigest
_RANGE: Final = 2.0**64


def order(endpoints: Sequence[EndpointLoad], session: int) -> list[EndpointLoad]:
    """The session's own order, whatever the weights."""
    scores = [score(endpoint, session) for endpoint in endpoints]
    places = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return [endpoints[place] for place in places]


def order_uniform(
    endpoints: Sequence[EndpointLoad], keys: Sequence[bytes], session: int
) -> list[EndpointLoad]:
    """The same order for endpoints that all weigh the same; `keys` are their hash keys. A third of the price."""
    scores = [_hash(key, session) for key in keys]
    if len(scores) == 2:
        return list(endpoints) if scores[0] >= scores[1] else [endpoints[1], endpoints[0]]
    places = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
    return [endpoints[place] for place in places]


def score(endpoint: EndpointLoad, session: int) -> float:
    """Higher is nearer to home."""
    weight = endpoint.weight * (endpoint.health or LEAST_HEALTH)
    return -weight / log((_hash(endpoint.hash_key, session) + 0.5) / _RANGE)


def home(endpoints: Sequence[EndpointLoad], session: int) -> EndpointLoad:
    """The first of the order that all endpoints would have if they were well."""

    def well(endpoint: EndpointLoad) -> float:
        return -endpoint.weight / log((_hash(endpoint.hash_key, session) + 0.5) / _RANGE)

    return max(endpoints, key=well)


def first_within_share(
    ordered: Sequence[EndpointLoad], factor: float, floor: int, now: float
) -> EndpointLoad:
    """The first that would stay within `factor` times its share with this request, or has fewer than `floor`."""
    first = ordered[0]
    mine = first.in_flight * first.processes if now >= first.fresh_until else first.requests(now)
    return first if mine < floor else within_share(ordered, factor, floor, now)[0]


def within_share(
    ordered: Sequence[EndpointLoad], factor: float, floor: int, now: float
) -> Sequence[EndpointLoad]:
    """All that would. Loads are of all processes, so one more here counts as one in each. Never empty."""
    loads = [e.in_flight * e.processes if now >= e.fresh_until else e.requests(now) for e in ordered]
    bound = factor * (sum(loads) + ordered[0].processes)
    weights = [endpoint.weight * (endpoint.health or LEAST_HEALTH) for endpoint in ordered]
    whole = sum(weights)
    within = [
        endpoint
        for endpoint, load, weight in zip(ordered, loads, weights, strict=True)
        if load < floor or load < bound * weight / whole
    ]
    return within or ordered
