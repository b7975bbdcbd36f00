"""The placement policies by name. A new one is one file and one line here."""

from backends.placement_config import PlacementConfig
from policies.placement.placer import Placer
from policies.placement.prefix_index import ApproximateIndex, PrefixIndex
from policies.placement.prefix_policy import PrefixPlacer
from policies.placement.session_policy import SessionPlacer
from policies.placement.spread import LeastLoaded, RoundRobin, Weighted


def placer(settings: PlacementConfig, index: PrefixIndex | None = None) -> Placer:
    """One for each target. `index` replaces the approximate one of the `prefix` policy."""
    remembered = settings.remembered_sessions
    match settings.policy:
        case "session":
            return SessionPlacer(remembered, settings.bounded_load, settings.bounded_load_floor)
        case "prefix":
            return PrefixPlacer(
                remembered,
                index or ApproximateIndex(settings.remembered_prefixes),
                prefill_tokens_per_s=settings.prefill_tokens_per_s,
                spill_s=settings.spill_s,
                bounded_load=settings.bounded_load,
                floor=settings.bounded_load_floor,
            )
        case "least-loaded":
            return LeastLoaded(remembered)
        case "round-robin":
            return RoundRobin(remembered)
        case "weighted":
            return Weighted(remembered)
