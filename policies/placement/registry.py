"""The placement policies by name. A new one is one file and one line here."""

from backends.placement_config import PlacementConfig
from policies.placement.block_index import BlockIndex
from policies.placement.placer import Placer
from policies.placement.prefix_policy import PrefixPlacer
from policies.placement.session_policy import SessionPlacer
from policies.placement.spread import LeastLoaded, RoundRobin, Weighted


def placer(settings: PlacementConfig, blocks: BlockIndex | None = None) -> Placer:
    """One for each target. `blocks` is the pool's exact index, for the `prefix` policy, where it has one."""
    remembered = settings.remembered_sessions
    match settings.policy:
        case "session":
            return SessionPlacer(remembered, settings.bounded_load, settings.bounded_load_floor)
        case "prefix":
            return PrefixPlacer(settings, blocks)
        case "least-loaded":
            return LeastLoaded(remembered)
        case "round-robin":
            return RoundRobin(remembered)
        case "weighted":
            return Weighted(remembered)
