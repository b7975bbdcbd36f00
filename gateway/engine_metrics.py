"""What the metrics page shows of engines that Headgate runs. The parent counts. Refuses to know how engines are run."""

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge


class EngineMetrics:
    """`restarts` are of simulators and of supervised engines, `failures` of the latter only."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.restarts = Counter(
            "headgate_engine_restarts_total",
            "Engine processes of pools that ended by themselves and were started again.",
            ["child"],
            registry=registry,
        )
        self.failures = Counter(
            "headgate_engine_failures_total",
            "Engines that died, hung or did not start, by what the log says of the cause.",
            ["engine", "kind", "cause"],
            registry=registry,
        )
        self._states = Gauge(
            "headgate_engine_state",
            "1 for the state that a supervised engine is in.",
            ["engine", "state"],
            registry=registry,
        )
        self._wanted = Gauge(
            "headgate_engines_wanted", "Engines that a pool should have.", ["pool"], registry=registry
        )

    def show(self, pools: Sequence[Mapping[str, Any]]) -> None:
        """As `Engines.view` has them."""
        self._states.clear()
        self._wanted.clear()
        for pool in pools:
            self._wanted.labels(pool["pool"]).set(0 if pool["is_asleep"] else pool["wanted"])
            for replica in pool["replicas"]:
                self._states.labels(replica["name"], replica["state"]).set(1)
