"""What the metrics page shows of placement: sessions, caches, load, and who waits."""

from collections.abc import Callable, Iterable, Mapping

from backends.pool import Endpoint
from gateway.locality import Locality
from gateway.telemetry import Telemetry
from gateway.waiting_room import WaitingRoom


def watch_placement(
    telemetry: Telemetry,
    locality: Locality,
    room: WaitingRoom,
    endpoints: Callable[[], Iterable[Endpoint]],
) -> None:
    """Counters of one worker; gauges of load are summed over the workers."""
    watch = telemetry.watch
    watch(
        "headgate_sessions_total",
        "counter",
        "Requests to pools with a choice: kept where their session was, moved, new to this worker, without a session.",
        lambda: locality.sessions,
        "state",
    )
    watch(
        "headgate_session_moves_total",
        "counter",
        "Requests whose session was elsewhere before, by why they moved.",
        lambda: locality.moves,
        "reason",
    )
    watch(
        "headgate_placements_total",
        "counter",
        "Requests that were sent, by what decided where.",
        lambda: locality.reasons,
        "reason",
    )
    for name, text, counts in (
        ("prompt", "Prompt tokens of answered requests to pools with a choice.", locality.prompt_tokens),
        ("predicted_cached", "Of those, expected in the endpoint's cache.", locality.predicted_tokens),
        ("cached", "Of those, read from the endpoint's cache.", locality.cached_tokens),
    ):
        watch(f"headgate_placed_{name}_tokens_total", "counter", text, counts.copy, "endpoint")
    watch(
        "headgate_uncached_tokens_in_flight",
        "gauge",
        "Prompt tokens that an endpoint has still to compute, as far as is known.",
        lambda: {endpoint.name: endpoint.uncached_tokens for endpoint in endpoints()},
        "endpoint",
    )
    watch("headgate_waiting_requests", "gauge", "Requests that wait for room in a pool.", room.sizes, "pool")
    watch(
        "headgate_waited_requests_total",
        "counter",
        "Requests that found a pool full and waited, or could not, by what became of them.",
        lambda: room.counts,
        "outcome",
    )
    watch(
        "headgate_waited_seconds_total",
        "counter",
        "Time that requests waited for room before they got it.",
        lambda: room.waited_s,
    )


def watch_caches(
    telemetry: Telemetry,
    locality: Locality,
    prompts: Mapping[str, int],
    blocks: Callable[[], dict[str, int]],
) -> None:
    """How well the engines' caches are known. Prompts and blocks are of pools that follow KV events."""
    telemetry.watch(
        "headgate_cache_predictions_total",
        "counter",
        "Predictions of cached tokens: exact, from the engine's KV events, or guessed, from what was sent.",
        lambda: locality.predictions,
        "source",
    )
    telemetry.watch(
        "headgate_prompt_tokenisations_total",
        "counter",
        "Prompts of pools that follow KV events, by whether the engine told their tokens, and why not.",
        lambda: prompts,
        "outcome",
    )
    telemetry.watch(
        "headgate_known_cache_blocks",
        "gauge",
        "Blocks that an endpoint is known to hold, in each worker.",
        blocks,
        "endpoint",
    )
