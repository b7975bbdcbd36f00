"""The simulator's `/metrics`, under vLLM's names and labels.

Gauges and counters are read from the engine when asked, so they cannot disagree with it; only the histograms are
kept here. Every series has `model_name` and `engine` labels, as vLLM's have. Knows no HTTP.
"""

from collections.abc import Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from local_engine.simulator.engine import Engine, Output

_LABELS: Final = ("model_name", "engine")
_SHORT_S: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
)
_LONG_S: Final = (
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
    1920,
    7680,
)
_TOKENS: Final = tuple(mantissa * 10**power for power in range(6) for mantissa in (1, 2, 5))


class Metrics(Collector):
    """One engine's series."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._values = (model, "0")
        self._registry = CollectorRegistry()
        self._first_token_s = self._histogram("time_to_first_token_seconds", (*_SHORT_S, 160, 640, 2560))
        self._gap_s = self._histogram("inter_token_latency_seconds", _SHORT_S)
        self._whole_s = self._histogram("e2e_request_latency_seconds", _LONG_S)
        self._queue_s = self._histogram("request_queue_time_seconds", _LONG_S)
        self._prefill_s = self._histogram("request_prefill_time_seconds", _LONG_S)
        self._decode_s = self._histogram("request_decode_time_seconds", _LONG_S)
        self._inference_s = self._histogram("request_inference_time_seconds", _LONG_S)
        self._prompt_tokens = self._histogram("request_prompt_tokens", _TOKENS)
        self._generation_tokens = self._histogram("request_generation_tokens", _TOKENS)
        self._registry.register(self)

    def observe(self, output: Output) -> None:
        """Take one output into the histograms. Aborted sequences have none, as in vLLM."""
        sequence = output.sequence
        if output.token is not None:
            if sequence.output_tokens == 1:
                self._first_token_s.observe(max(0.0, sequence.last_token_at - sequence.arrived_at))
            else:
                self._gap_s.observe(sequence.gap_s)
        if output.finish_reason is None or sequence.scheduled_at is None or sequence.first_token_at is None:
            return
        self._whole_s.observe(max(0.0, sequence.finished_at - sequence.arrived_at))
        self._queue_s.observe(max(0.0, sequence.scheduled_at - sequence.arrived_at))
        self._prefill_s.observe(sequence.first_token_at - sequence.scheduled_at)
        self._decode_s.observe(sequence.finished_at - sequence.first_token_at)
        self._inference_s.observe(sequence.finished_at - sequence.scheduled_at)
        self._prompt_tokens.observe(sequence.prompt_tokens)
        self._generation_tokens.observe(sequence.output_tokens)

    def render(self) -> bytes:
        """The exposition in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """For the registry."""
        yield from self._gauges()
        counters, settings = self._engine.counters, self._engine.settings
        for name, value in (
            ("prompt_tokens", counters.prompt_tokens),
            ("prompt_tokens_cached", counters.cached_prompt_tokens),
            ("generation_tokens", counters.generation_tokens),
            ("prefix_cache_queries", counters.cache_query_tokens),
            ("prefix_cache_hits", counters.cache_hit_tokens),
            ("external_prefix_cache_hits", counters.loaded_tokens),
            ("num_preemptions", counters.preemptions),
        ):
            yield self._counter(name, {"": value})
        by_source = {
            "local_compute": counters.prompt_tokens - counters.hit_prompt_tokens - counters.loaded_tokens,
            "local_cache_hit": counters.hit_prompt_tokens,
            "external_kv_transfer": counters.loaded_tokens,
        }
        yield self._counter("prompt_tokens_by_source", by_source, "source")
        # A sequence that its client left is not counted here; that is vLLM's habit too.
        finished = {
            str(reason): 0 if reason == "abort" else count for reason, count in counters.finished.items()
        }
        yield self._counter("request_success", finished, "finished_reason")
        rejections = CounterMetricFamily("vllm:admission_rejections", "", labels=("model_name", "reason"))
        for limit, count in counters.admission_rejections.items():
            rejections.add_metric((self._values[0], limit), count)
        yield rejections
        config = {
            "block_size": str(settings.block_size),
            "num_gpu_blocks": str(settings.num_blocks),
            "enable_prefix_caching": "True",
            "prefix_caching_hash_algo": "sha256_cbor",
        }
        family = GaugeMetricFamily("vllm:cache_config_info", "", labels=(*config, "engine"))
        family.add_metric((*config.values(), "0"), 1)
        yield family

    def _gauges(self) -> Iterator[Metric]:
        waiting = len(self._engine.waiting)
        for name, value in (
            ("num_requests_running", len(self._engine.running)),
            ("num_requests_waiting", waiting),
            ("kv_cache_usage_perc", self._engine.cache_usage),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", "", labels=_LABELS)
            family.add_metric(self._values, value)
            yield family
        family = GaugeMetricFamily("vllm:num_requests_waiting_by_reason", "", labels=(*_LABELS, "reason"))
        family.add_metric((*self._values, "capacity"), waiting)
        family.add_metric((*self._values, "deferred"), 0)
        yield family

    def _counter(self, name: str, values: Mapping[str, float], label: str | None = None) -> Metric:
        """One series, or with `label` one for each of its values."""
        family = CounterMetricFamily(f"vllm:{name}", "", labels=(*_LABELS, label) if label else _LABELS)
        for own, value in values.items():
            family.add_metric((*self._values, own) if label else self._values, value)
        return family

    def _histogram(self, name: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(
            f"vllm:{name}", name.replace("_", " "), _LABELS, registry=self._registry, buckets=buckets
        )
        return family.labels(*self._values)
