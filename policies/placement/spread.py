"""Policies that know no caches: `least-loaded`, `round-robin`, `weighted`.

Load is measured in prompt tokens still to be computed, plus a sum for each request that runs: by the number of
requests alone, long prompts pile up on one engine (vllm#48808). Ties rotate, so that an idle pool fills evenly.
"""

from collections.abc import Sequence
from typing import Final

from backends.load import LEAST_HEALTH, EndpointLoad
from policies.placement.ask import Ask
from policies.placement.placer import Placer, Ranking

# What a running request costs the others, in tokens of prefill.
REQUEST_TOKENS: Final = 256


def token_loads(endpoints: Sequence[EndpointLoad], now: float) -> list[float]:
    """Of each endpoint, from all processes, per unit of its weight and health."""
    return [
        (
            e.uncached_tokens * e.processes
            + REQUEST_TOKENS * (e.in_flight * e.processes if now >= e.fresh_until else e.requests(now))
        )
        / (e.weight * (e.health or LEAST_HEALTH))
        for e in endpoints
    ]


def rotated(count: int, turn: int) -> list[int]:
    start = turn % count
    return [*range(start, count), *range(start)]


class LeastLoaded(Placer):
    """The least loaded first."""

    name = "least-loaded"

    def __init__(self, remembered_sessions: int) -> None:
        super().__init__(remembered_sessions)
        self._turn = 0

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        del everyone, ask
        loads = token_loads(endpoints, now)
        places = sorted(rotated(len(loads), self._turn), key=loads.__getitem__)
        return Ranking([endpoints[place] for place in places], "load")

    def dispatched(self, endpoint: EndpointLoad, ask: Ask, now: float) -> None:
        super().dispatched(endpoint, ask, now)
        self._turn += 1


class RoundRobin(Placer):
    """One after the other, whatever their load."""

    name = "round-robin"

    def __init__(self, remembered_sessions: int) -> None:
        super().__init__(remembered_sessions)
        self._turn = 0

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        del everyone, ask, now
        return Ranking([endpoints[place] for place in rotated(len(endpoints), self._turn)], "turn")

    def dispatched(self, endpoint: EndpointLoad, ask: Ask, now: float) -> None:
        super().dispatched(endpoint, ask, now)
        self._turn += 1


class Weighted(Placer):
    """In proportion to the weights, spread smoothly, whatever the load.

    nginx's smooth weighted round-robin: each turn everyone gains its weight, and the chosen one pays for all.
    """

    name = "weighted"

    def __init__(self, remembered_sessions: int) -> None:
        super().__init__(remembered_sessions)
        self._credit: dict[bytes, float] = {}
        self._ranked: Sequence[EndpointLoad] = ()

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        del ask, now
        self._ranked = everyone
        credit = self._credit
        due = [credit.get(e.hash_key, 0.0) + e.weight * (e.health or LEAST_HEALTH) for e in endpoints]
        places = sorted(range(len(due)), key=due.__getitem__, reverse=True)
        return Ranking([endpoints[place] for place in places], "turn")

    def dispatched(self, endpoint: EndpointLoad, ask: Ask, now: float) -> None:
        super().dispatched(endpoint, ask, now)
        credit = {
            e.hash_key: self._credit.get(e.hash_key, 0.0) + e.weight * (e.health or LEAST_HEALTH)
            for e in self._ranked
        }
        credit[endpoint.hash_key] = credit.get(endpoint.hash_key, 0.0) - sum(
            e.weight * (e.health or LEAST_HEALTH) for e in self._ranked
        )
        self._credit = credit  # endpoints that are gone are forgotten with it
