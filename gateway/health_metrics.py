"""What the metrics page shows of health: who is left out and why, what was sent again, what failed attempts cost."""

from collections.abc import Mapping

from gateway.health_watch import HealthWatch
from gateway.telemetry import Telemetry


def watch_health(
    telemetry: Telemetry,
    health: HealthWatch,
    retries: Mapping[str, int],
    wasted_nanousd: Mapping[str, int],
) -> None:
    """Counters of one worker; gauges are summed over the workers, so that one that all leave out counts them all."""
    watch = telemetry.watch
    watch(
        "headgate_endpoint_out",
        "gauge",
        "Workers that leave an endpoint out.",
        lambda: {name: float(share == 0.0) for name, share in health.shares().items()},
        "endpoint",
    )
    watch(
        "headgate_endpoint_ejections_total",
        "counter",
        "Times an endpoint was taken out, by why: an error's kind, a status, slow, stalled.",
        lambda: health.ejections,
        ("endpoint", "reason"),
    )
    watch(
        "headgate_attempts_unanswered",
        "gauge",
        "Attempts at an endpoint that no byte of an answer has come of yet.",
        health.unanswered,
        "endpoint",
    )
    watch(
        "headgate_retries_total",
        "counter",
        "Failed attempts, by what became of them: retried in their pool, gone on to another target, sent with another "
        "key, not retried because the budget was spent.",
        lambda: retries,
        "outcome",
    )
    watch(
        "headgate_wasted_nanousd_total",
        "counter",
        "What failed attempts may have cost us, in nano-dollars; no caller pays for it.",
        lambda: wasted_nanousd,
        "endpoint",
    )
