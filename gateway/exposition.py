"""The metrics page: what all workers counted, added up, in Prometheus' text format.

Lives in the parent. A counter never goes backwards when a worker is replaced: the last snapshot of a worker that
is gone stays in the sum. Gauges are summed over living workers only. Refuses to know what the families mean, but
for the two that are derived here (dollars from nano-dollars, and the share of spend that is known).
"""

from collections.abc import Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gateway.control import Samples, Snapshot

# Understood by every scraper; what `generate_latest` writes for our ASCII names is the same in all versions.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

_Value = int | float | list[int | float]


class _Family:
    """One family summed: label values -> number, or a histogram's counts and sum."""

    __slots__ = ("bounds", "help", "kind", "labels", "values")

    def __init__(self, like: Samples) -> None:
        self.kind = like.kind
        self.help = like.help
        self.labels = like.labels
        self.bounds = like.bounds
        self.values: dict[tuple[str, ...], _Value] = {}

    def add(self, samples: Samples) -> None:
        for labels, value in samples.samples:
            key = tuple(labels)
            before = self.values.get(key)
            self.values[key] = value if before is None else _sum(before, value)


class Totals(Collector):
    """The sum over workers, living and gone."""

    def __init__(self) -> None:
        self._latest: dict[str, Snapshot] = {}
        self._gone: dict[str, _Family] = {}

    def update(self, worker: str, snapshot: Snapshot) -> None:
        """The newest snapshot of a living worker. Names are never used again after `retire`."""
        self._latest[worker] = snapshot

    def retire(self, worker: str) -> None:
        """The worker is gone; what it counted stays."""
        _add(self._gone, self._latest.pop(worker, {}), with_gauges=False)

    def collect(self) -> Iterator[Metric]:
        families: dict[str, _Family] = {}
        for name, gone in self._gone.items():
            families[name] = _Family(Samples(gone.kind, gone.help, gone.labels, [], gone.bounds))
            families[name].values = dict(gone.values)
        for snapshot in self._latest.values():
            _add(families, snapshot, with_gauges=True)
        for name, family in families.items():
            yield _metric(name, family)
        cost = families.get("headgate_cost_nanousd_total")
        if cost is not None:
            yield _dollars(cost)
        yield _spend_capture(families)


def _add(families: dict[str, _Family], snapshot: Snapshot, *, with_gauges: bool) -> None:
    for name, samples in snapshot.items():
        if samples.kind == "gauge" and not with_gauges:
            continue
        if name not in families:
            families[name] = _Family(samples)
        families[name].add(samples)


def _sum(left: _Value, right: _Value) -> _Value:
    if isinstance(left, list) and isinstance(right, list):
        return [a + b for a, b in zip(left, right, strict=True)]
    assert not isinstance(left, list)
    assert not isinstance(right, list)
    return left + right


def _metric(name: str, family: _Family) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
        les = [*(f"{bound:.12g}" for bound in family.bounds), "+Inf"]
        for labels, value in family.values.items():
            assert isinstance(value, list)
            counts = accumulate(value[:-1])
            histogram.add_metric(list(labels), list(zip(les, counts, strict=True)), sum_value=value[-1])
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.help, labels=family.labels)
    for labels, value in family.values.items():
        assert not isinstance(value, list)
        metric.add_metric(list(labels), value)
    return metric


def _dollars(cost: _Family) -> Metric:
    metric = CounterMetricFamily(
        "headgate_cost_usd", "Cost in US dollars, as the ledger has it.", labels=cost.labels
    )
    for labels, value in cost.values.items():
        assert not isinstance(value, list)
        metric.add_metric(list(labels), value / 1e9)
    return metric


def _spend_capture(families: dict[str, _Family]) -> Metric:
    """Priced / billed requests; 1 while nothing was billed, so that an alert on it stays quiet."""
    billed, priced = (
        sum(value for value in families[name].values.values() if not isinstance(value, list))
        if name in families
        else 0
        for name in ("headgate_billed_requests_total", "headgate_priced_requests_total")
    )
    return GaugeMetricFamily(
        "headgate_spend_capture_ratio",
        "Share of the billed requests whose cost is known, since the start.",
        value=priced / billed if billed else 1.0,
    )


class Page:
    """All metrics of the service: the workers' totals and what the parent itself counts."""

    def __init__(self, version: str) -> None:
        # The parent's counters all begin with the parent.
        disable_created_metrics()  # type: ignore[no-untyped-call] # the library does not say
        self.totals = Totals()
        self._registry = CollectorRegistry()
        self.reloads = Counter(
            "headgate_config_reloads_total",
            "Configuration reloads by result: applied, refused, failed in a worker.",
            ["result"],
            registry=self._registry,
        )
        self.worker_restarts = Counter(
            "headgate_worker_restarts_total",
            "Workers replaced: crashed, hung, rotated.",
            ["reason"],
            registry=self._registry,
        )
        # From the first scrape on: an alert on an increase wants to have seen the zero.
        for result in ("applied", "refused", "failed"):
            self.reloads.labels(result)
        for reason in ("crashed", "hung", "rotated"):
            self.worker_restarts.labels(reason)
        self.engine_restarts = Counter(
            "headgate_engine_restarts_total",
            "Engine processes of pools that ended by themselves and were started again.",
            ["child"],
            registry=self._registry,
        )
        self.probes = Counter(
            "headgate_probes_total",
            "Trials of endpoints that are out, by result: ok, bad.",
            ["endpoint", "result"],
            registry=self._registry,
        )
        self.workers = Gauge(
            "headgate_workers", "Worker processes by state.", ["state"], registry=self._registry
        )
        self._drift = Gauge(
            "headgate_limit_drift_nanousd",
            "What budgets have counted beyond the ledger, at the latest check.",
            registry=self._registry,
        )
        self._corrections = Gauge(
            "headgate_limit_corrections",
            "Budgets that had less than the ledger and were brought up to it, since the start.",
            registry=self._registry,
        )
        self._checked = Gauge(
            "headgate_limit_check_timestamp_seconds",
            "When budgets were last compared with the ledger; 0: not yet.",
            registry=self._registry,
        )
        self._alerts = self._deliveries("headgate_alert_deliveries", "alerts")
        self._webhooks = self._deliveries("headgate_webhook_deliveries", "the queue's webhooks")
        Gauge("headgate_build_info", "Always 1.", ["version"], registry=self._registry).labels(version).set(1)
        self._registry.register(self.totals)

    def _deliveries(self, name: str, what: str) -> Gauge:
        text = f"Attempts to deliver {what} since the start, by outcome."
        return Gauge(name, text, ["outcome"], registry=self._registry)

    def set_budgets(self, drift_nanousd: int, corrections: int, checked_time: float) -> None:
        self._drift.set(drift_nanousd)
        self._corrections.set(corrections)
        self._checked.set(checked_time)

    def set_alerts(self, delivered: int, failed: int) -> None:
        self._alerts.labels("delivered").set(delivered)
        self._alerts.labels("failed").set(failed)

    def set_webhooks(self, delivered: int, failed: int) -> None:
        self._webhooks.labels("delivered").set(delivered)
        self._webhooks.labels("failed").set(failed)

    def render(self) -> bytes:
        return generate_latest(self._registry)
