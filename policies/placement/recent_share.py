"""What share of a pool's recent requests each endpoint got, as this process knows.

Requests in flight are a noisy sample of how many sessions live where: bounding only them moves sessions, and their
caches, for chance alone (docs/decisions/0020). Here every request counts for about a minute, fading. All counts are
kept in units that grow with time, so that nothing has to be aged.
"""

from collections.abc import Sequence
from math import exp, sqrt
from typing import Final

from backends.load import LEAST_HEALTH, EndpointLoad

# How long a request counts, in seconds: some turns of a conversation.
_MEMORY_S: Final = 60.0
# Before the units grow out of bounds, all is written down in new ones.
_EPOCH_S: Final = 100 * _MEMORY_S
_DEVIATIONS: Final = 2.0


class RecentShare:
    """Counts what `add` is told of, for the endpoints that `keep` named last."""

    __slots__ = ("_counts", "_floor", "_since", "_total", "_weight")

    def __init__(self, floor: int) -> None:
        """Of an endpoint with fewer recent requests than `floor` nothing is concluded."""
        self._floor = floor
        self._counts: dict[bytes, float] = {}
        self._total = 0.0
        self._weight = 1.0
        self._since: float | None = None

    def keep(self, everyone: Sequence[EndpointLoad]) -> None:
        """The pool is these."""
        self._counts = {e.hash_key: self._counts.get(e.hash_key, 0.0) for e in everyone}
        self._total = sum(self._counts.values())
        self._weight = sum(e.weight for e in everyone)

    def add(self, endpoint: EndpointLoad, now: float) -> None:
        if endpoint.hash_key in self._counts:
            unit = self._unit(now)
            self._counts[endpoint.hash_key] += unit
            self._total += unit

    def of(self, endpoint: EndpointLoad, endpoints: Sequence[EndpointLoad], now: float) -> float:
        """1: as much as its weight and health among `endpoints` say. 0 below the floor."""
        unit = self._unit(now)
        return self._share(endpoint, unit, self._fair(endpoints))

    def of_each(self, endpoints: Sequence[EndpointLoad], now: float) -> list[float]:
        unit = self._unit(now)
        fair = self._fair(endpoints)
        return [self._share(endpoint, unit, fair) for endpoint in endpoints]

    def _share(self, endpoint: EndpointLoad, unit: float, fair: float) -> float:
        count = self._counts.get(endpoint.hash_key, 0.0)
        if count < self._floor * unit:
            return 0.0
        share = count / fair / (endpoint.weight * (endpoint.health or LEAST_HEALTH))
        if endpoint.processes > 1:
            # Each process has a sample of its own, and where they disagree for chance, sessions go to and fro.
            share -= share * _DEVIATIONS / sqrt(count / unit)
        return share

    def _fair(self, endpoints: Sequence[EndpointLoad]) -> float:
        """What an endpoint of weight 1 among these should have; not 0."""
        if len(endpoints) == len(self._counts):
            total, weight = self._total, self._weight
        else:
            total = sum(self._counts.get(e.hash_key, 0.0) for e in endpoints)
            weight = sum(e.weight * (e.health or LEAST_HEALTH) for e in endpoints)
        return total / weight or 1.0

    def _unit(self, now: float) -> float:
        if self._since is None:
            self._since = now
        age_s = now - self._since
        if age_s > _EPOCH_S:
            fading = exp(-age_s / _MEMORY_S)
            self._counts = {key: count * fading for key, count in self._counts.items()}
            self._total *= fading
            self._since, age_s = now, 0.0
        return exp(age_s / _MEMORY_S)
