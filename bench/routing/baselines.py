"""What the product's policies are held against: pure affinity and chance. Round-robin and least-loaded are the product's own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from backends.load import EndpointLoad
from backends.placement_config import PlacementConfig
from policies.placement import registry
from policies.placement.ask import Ask
from policies.placement.placer import Placer, Ranking
from policies.placement.rendezvous import order


class PureAffinity(Placer):
    """Every session at the endpoint of its hash, however much that has to do."""

    name = "pure-affinity"
    wants_session = True

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        del everyone, now
        return Ranking(order(endpoints, ask.session), "home")


class Chance(Placer):
    name = "random"

    def __init__(self, remembered_sessions: int) -> None:
        super().__init__(remembered_sessions)
        self._random = random.Random(0)

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        del everyone, ask, now
        return Ranking(self._random.sample(endpoints, len(endpoints)), "turn")


OWN = ("session", "prefix", "least-loaded", "round-robin")


def maker(name: str, **settings: object) -> Callable[[], Placer]:
    """A placer by name, as the gateway makes it from its configuration."""
    if name == PureAffinity.name:
        return lambda: PureAffinity(100_000)
    if name == Chance.name:
        return lambda: Chance(100_000)
    config = PlacementConfig.model_validate({"policy": name, **settings})
    return lambda: registry.placer(config)


NAMES = (*OWN, PureAffinity.name, Chance.name)
