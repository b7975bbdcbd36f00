"""How full an endpoint is, as one number: 1 is full.

The worst of what is known: requests against the endpoint's limit, its own queue against the length it may have, its
KV memory against the share above which engines begin to throw caches out. Scraped figures count while they are
fresh; stale ones are not known. Sources: llm-d's utilization detector (queue 5, KV 0.8).
"""

from collections.abc import Iterable
from typing import Final

from backends.load import EndpointLoad

KV_FULL: Final = 0.8


def saturation(endpoint: EndpointLoad, now: float) -> float:
    """0 where no limit is known."""
    worst = 0.0
    if endpoint.max_in_flight:
        worst = endpoint.requests(now) / endpoint.max_in_flight
    if now < endpoint.fresh_until:
        if endpoint.max_waiting:
            worst = max(worst, endpoint.waiting / endpoint.max_waiting)
        worst = max(worst, endpoint.kv_usage / KV_FULL)
    return worst


def has_room(endpoint: EndpointLoad, now: float, ceiling: float = 1.0) -> bool:
    """Whether one more fits below this saturation."""
    if not endpoint.max_in_flight and now >= endpoint.fresh_until:
        return True
    return saturation(endpoint, now) < ceiling


def pool_saturation(endpoints: Iterable[EndpointLoad], now: float) -> float:
    """The mean, as the gate of a queue wants it; 1 without endpoints."""
    figures = [saturation(endpoint, now) for endpoint in endpoints]
    return sum(figures) / len(figures) if figures else 1.0
