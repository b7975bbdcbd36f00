"""What a worker counts about its requests.

Owns the metric families and their buckets. Hand-rolled because it runs once per request: `observe` costs a
microsecond, prometheus_client's objects ten times that. Nothing here renders; `gateway.exposition` does, for
all workers together. Labels are bounded: never a key, a session or a string a client made up.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Final, NamedTuple

from gateway.control import Samples, Snapshot
from policies.exchange import Exchange

# Beyond the listed models, names that an upstream has answered for: providers' wildcards are open-ended.
MAX_UNLISTED_MODELS: Final = 200
_FOLD_EVERY: Final = 64  # requests: 60 us of work then
OTHER: Final = "other"

# The buckets OpenTelemetry's GenAI conventions ask for.
TOKEN_BOUNDS: Final = tuple(float(4**n) for n in range(14))
DURATION_BOUNDS: Final = tuple(0.01 * 2**n for n in range(14))
FIRST_TOKEN_BOUNDS: Final[tuple[float, ...]] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1),
    *(0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
PER_TOKEN_BOUNDS: Final[tuple[float, ...]] = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2),
    *(0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
# Ours: from 10 us, because the gateway's own share of a request is tens of microseconds, to a long stream.
STAGE_BOUNDS: Final[tuple[float, ...]] = (
    *(1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0),
)

_OPERATIONS: Final = {
    "chat": "chat",
    "responses": "chat",
    "messages": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
_GEN_AI: Final = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
_MODEL: Final = ("provider", "model")

# Family -> (attribute of _Series, bounds, help).
_GEN_AI_HISTOGRAMS: Final = {
    "gen_ai_server_request_duration_seconds": (
        "duration",
        DURATION_BOUNDS,
        "Duration of requests that were sent upstream, as the client saw it.",
    ),
    "gen_ai_server_time_to_first_token_seconds": (
        "first_token",
        FIRST_TOKEN_BOUNDS,
        "Time to the first relayed byte of a streamed answer.",
    ),
    "gen_ai_server_time_per_output_token_seconds": (
        "per_token",
        PER_TOKEN_BOUNDS,
        "Time per output token after the first, of streamed answers.",
    ),
}
# Family -> (attribute of _Series, help). "Billed" requests: answered with 2xx, or withdrawn with usage estimated.
_MONEY_COUNTERS: Final = {
    "headgate_cost_nanousd_total": ("cost_nanousd", "Cost in nano-dollars, as the ledger has it."),
    "headgate_billed_requests_total": ("billed", "Requests an upstream will charge for."),
    "headgate_priced_requests_total": ("priced", "Billed requests whose cost is known."),
    "headgate_zero_cost_requests_total": ("zero_cost", "Billed requests whose known cost is zero."),
    "headgate_unknown_price_requests_total": (
        "unknown_price",
        "Billed requests with usage but no known price.",
    ),
    "headgate_unknown_usage_requests_total": ("unknown_usage", "Billed requests without a reported usage."),
    "headgate_estimated_requests_total": ("estimated", "Billed requests whose usage is an estimate."),
}


class Histogram:
    """Counts per bucket (not cumulative; the last is beyond all bounds) and the sum of the values.

    A value costs the append to a list; many at a time are sorted into their buckets, for a fifth of what looking
    each one up would cost. Whoever observes must `fold` now and then.
    """

    __slots__ = ("_bounds", "_counts", "_fresh", "_sum", "observe", "observe_all")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0
        self._fresh: list[float] = []
        self.observe = self._fresh.append
        self.observe_all = self._fresh.extend

    def fold(self) -> None:
        """Counts what was observed since the last time."""
        fresh, counts = self._fresh, self._counts
        fresh.sort()
        below = 0
        for bucket, bound in enumerate(self._bounds):
            if below == len(fresh):
                break
            up_to = bisect_right(fresh, bound, below)
            counts[bucket] += up_to - below
            below = up_to
        counts[-1] += len(fresh) - below
        self._sum += sum(fresh)
        fresh.clear()

    def sample(self) -> list[int | float]:
        self.fold()
        return [*self._counts, self._sum]


class _Series:
    """All that is counted per dialect, provider and model, so that a request looks it up once."""

    __slots__ = (
        "billed",
        "cache_read_tokens",
        "cache_write_tokens",
        "cost_nanousd",
        "duration",
        "estimated",
        "first_token",
        "input",
        "input_tokens",
        "output",
        "output_tokens",
        "per_token",
        "priced",
        "reasoning_tokens",
        "unknown_price",
        "unknown_usage",
        "zero_cost",
    )

    def __init__(self) -> None:
        self.duration = Histogram(DURATION_BOUNDS)
        self.first_token = Histogram(FIRST_TOKEN_BOUNDS)
        self.per_token = Histogram(PER_TOKEN_BOUNDS)
        self.input = Histogram(TOKEN_BOUNDS)
        self.output = Histogram(TOKEN_BOUNDS)
        self.input_tokens = 0  # fresh ones
        self.cache_read_tokens = 0
        self.cache_write_tokens = 0
        self.output_tokens = 0
        self.reasoning_tokens = 0
        self.billed = 0
        self.priced = 0
        self.zero_cost = 0
        self.unknown_price = 0
        self.unknown_usage = 0
        self.estimated = 0
        self.cost_nanousd = 0


# One number, or numbers by the value of a label, or of several.
_Reading = float | Mapping[str, float] | Mapping[tuple[str, str], int]


class _Watched(NamedTuple):
    kind: str
    help: str
    label: str | tuple[str, ...]
    read: Callable[[], _Reading]


class Telemetry:
    """One worker's counts since it started."""

    def __init__(self) -> None:
        self._listed: frozenset[str] = frozenset()
        self._unlisted: set[str] = set()
        self._requests: dict[tuple[str, str, int], int] = {}
        self._failed_attempts: dict[tuple[str, str], int] = {}
        self._fallbacks: dict[tuple[str, str, str], int] = {}
        self._shadows: dict[tuple[str, str], int] = {}
        self._shadow_cost_nanousd: dict[str, int] = {}
        self.rule_outcomes: dict[tuple[str, str], int] = {}  # by rule and outcome; the rules count
        self._denials: dict[str, int] = {}
        self._series: dict[
            tuple[str, str, str], _Series
        ] = {}  # by operation, provider and label of the model
        # By dialect, provider and name of the model, where that is its label.
        self._series_of: dict[tuple[str, str, str], _Series] = {}
        self._watched: dict[str, _Watched] = {}
        self._read = Histogram(STAGE_BOUNDS)
        self._place = Histogram(STAGE_BOUNDS)
        self._send = Histogram(STAGE_BOUNDS)
        self._relay = Histogram(STAGE_BOUNDS)
        self._settle = Histogram(STAGE_BOUNDS)
        self._overhead = Histogram(STAGE_BOUNDS)
        # Of answered requests since the last fold: what goes to each histogram of `_shares`.
        self._fresh: list[tuple[float, ...]] = []
        self._shares = (self._read, self._place, self._send, self._relay, self._overhead, self._settle)
        self._unfolded = 0  # requests

    def list_models(self, names: Iterable[str]) -> None:
        """The catalog's names: those that may be a label from the first request on. Called at every reload."""
        self._listed = frozenset(names)
        self._series_of.clear()

    def watch(
        self,
        name: str,
        kind: str,
        text: str,
        read: Callable[[], _Reading],
        label: str | tuple[str, ...] = "",
    ) -> None:
        """A counter or gauge that somebody else keeps, read when metrics are collected.

        With `label`, `read` returns label value -> number; with several, a tuple of their values. Counters must never go down in one worker's life.
        """
        self._watched[name] = _Watched(kind, text, label, read)

    def observe(self, exchange: Exchange) -> None:
        """Once per request, at the end of settle."""
        self._unfolded += 1
        if self._unfolded == _FOLD_EVERY:
            self._fold()
        if exchange.is_shadow:
            self._observe_shadow(exchange)
            return
        key = (exchange.dialect.name, exchange.ended, exchange.status)
        try:
            self._requests[key] += 1
        except KeyError:
            self._requests[key] = 1
        ended_at, read_at = exchange.ended_at, exchange.read_at
        dispatched_at, first_byte_at = exchange.dispatched_at, exchange.first_byte_at
        if first_byte_at and dispatched_at:
            self._fresh.append(
                (
                    read_at - exchange.received_at,
                    dispatched_at - read_at,
                    first_byte_at - dispatched_at,
                    ended_at - first_byte_at,
                    exchange.overhead_s,
                    perf_counter() - ended_at,
                )
            )
            self._observe_model(exchange)
            return
        if read_at:
            self._read.observe(read_at - exchange.received_at)
        if dispatched_at:
            self._place.observe(dispatched_at - read_at)
            self._overhead.observe(exchange.overhead_s)
            self._settle.observe(perf_counter() - ended_at)
            self._observe_model(exchange)
        elif exchange.ended == "denied":
            self._denials[exchange.error_kind] = self._denials.get(exchange.error_kind, 0) + 1

    def _sort_out(self) -> None:
        """What was observed together goes to each histogram."""
        if self._fresh:
            for histogram, values in zip(self._shares, zip(*self._fresh, strict=True), strict=True):
                histogram.observe_all(values)
            self._fresh.clear()

    def _fold(self) -> None:
        self._unfolded = 0
        self._sort_out()
        self._overhead.fold()
        for _, histogram in self._stages():
            histogram.fold()
        for series in self._series.values():
            for histogram in (
                series.duration,
                series.first_token,
                series.per_token,
                series.input,
                series.output,
            ):
                histogram.fold()

    def attempt_failed(self, endpoint: str, reason: str) -> None:
        """An attempt that is followed by another. `reason` is an `ErrorKind` or a status."""
        key = (endpoint, reason)
        self._failed_attempts[key] = self._failed_attempts.get(key, 0) + 1

    def fell_back(self, exchange: Exchange, failure: str) -> None:
        """The exchange's model is now another than the one that failed. Both are named in the configuration."""
        model = exchange.model.name if exchange.model is not None else OTHER
        key = (exchange.fallen_from[-1].name, model, failure)
        self._fallbacks[key] = self._fallbacks.get(key, 0) + 1

    def _observe_shadow(self, exchange: Exchange) -> None:
        model = exchange.model_name
        key = (model, exchange.ended)
        self._shadows[key] = self._shadows.get(key, 0) + 1
        cost_nanousd = exchange.cost_nanousd or 0
        self._shadow_cost_nanousd[model] = self._shadow_cost_nanousd.get(model, 0) + cost_nanousd

    def _observe_model(self, exchange: Exchange) -> None:
        candidate = exchange.candidate
        provider = candidate.endpoint.provider.name if candidate is not None else OTHER
        model = exchange.model.name if exchange.model is not None else OTHER
        dialect = exchange.dialect
        series = self._series_of.get((dialect.name, provider, model))
        if series is None:
            series = self._find_series(dialect.name, provider, model, exchange.status)
        ended_at = exchange.ended_at
        series.duration.observe(ended_at - exchange.received_at)
        usage = exchange.usage
        if exchange.is_stream and exchange.relayed_at:
            series.first_token.observe(exchange.relayed_at - exchange.received_at)
            if usage is not None and usage.output_tokens > 1:
                series.per_token.observe((ended_at - exchange.relayed_at) / (usage.output_tokens - 1))
        if not dialect.is_billed or (usage is None and not 200 <= exchange.status < 300):
            return
        series.billed += 1
        if usage is None:
            series.unknown_usage += 1
            return
        fresh, read, output = usage.input_tokens, usage.cache_read_tokens, usage.output_tokens
        written = usage.cache_write_5m_tokens + usage.cache_write_1h_tokens
        series.input.observe(fresh + read + written)
        series.output.observe(output)
        series.input_tokens += fresh
        series.cache_read_tokens += read
        series.cache_write_tokens += written
        series.output_tokens += output
        if usage.reasoning_tokens:
            series.reasoning_tokens += usage.reasoning_tokens
        if exchange.is_estimated:
            series.estimated += 1
        cost_nanousd = exchange.cost_nanousd
        if cost_nanousd is None:
            series.unknown_price += 1
            return
        series.priced += 1
        series.cost_nanousd += cost_nanousd
        if not cost_nanousd:
            series.zero_cost += 1

    def _find_series(self, dialect: str, provider: str, model: str, status: int) -> _Series:
        label = model if model in self._listed else self._unlisted_label(model, status)
        key = (_OPERATIONS.get(dialect, dialect), provider, label)
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series()
        if label == model:
            self._series_of[dialect, provider, model] = series
        return series

    def _unlisted_label(self, name: str, status: int) -> str:
        """A wildcard's model becomes a label once an upstream has served it, and only so many of them."""
        if name in self._unlisted:
            return name
        if 200 <= status < 300 and len(self._unlisted) < MAX_UNLISTED_MODELS:
            self._unlisted.add(name)
            return name
        return OTHER

    def snapshot(self) -> Snapshot:
        """Everything counted so far, in a form that can be sent and added up."""
        self._sort_out()
        families = {
            "headgate_requests_total": self._request_samples(),
            "headgate_stage_seconds": Samples(
                "histogram",
                "Time spent in each stage of a request; `send` is the upstream's time to the head of its answer.",
                ["stage"],
                [([name], histogram.sample()) for name, histogram in self._stages()],
                list(STAGE_BOUNDS),
            ),
            "headgate_overhead_seconds": Samples(
                "histogram",
                "The gateway's own share of a request's duration.",
                [],
                [([], self._overhead.sample())],
                list(STAGE_BOUNDS),
            ),
        }
        families["headgate_failed_attempts_total"] = Samples(
            "counter",
            "Attempts that failed and were followed by another, by endpoint and reason.",
            ["endpoint", "reason"],
            [(list(key), count) for key, count in self._failed_attempts.items()],
        )
        families |= self._routing_samples()
        families["headgate_denials_total"] = Samples(
            "counter",
            "Requests that were refused before they were sent, by the code of the refusal.",
            ["code"],
            [([code], count) for code, count in self._denials.items()],
        )
        families |= self._gen_ai_samples()
        families |= self._money_samples()
        for name, watched in self._watched.items():
            families[name] = _read_watched(watched)
        return families

    def _stages(self) -> Iterable[tuple[str, Histogram]]:
        return (
            ("read", self._read),
            ("place", self._place),
            ("send", self._send),
            ("relay", self._relay),
            ("settle", self._settle),
        )

    def _request_samples(self) -> Samples:
        totals: dict[tuple[str, str, str], int] = {}
        for (dialect, ended, status), count in self._requests.items():
            key = (dialect, ended, f"{status // 100}xx" if status else "none")
            totals[key] = totals.get(key, 0) + count
        return Samples(
            "counter",
            "Requests by dialect, how they ended and the class of their status.",
            ["dialect", "ended", "status_class"],
            [(list(key), count) for key, count in totals.items()],
        )

    def _routing_samples(self) -> Snapshot:
        return {
            "headgate_rule_outcomes_total": Samples(
                "counter",
                "Rules that were followed (matched), and conditions that read what a request does not have (no_value).",
                ["rule", "outcome"],
                [(list(key), count) for key, count in self.rule_outcomes.items()],
            ),
            "headgate_fallbacks_total": Samples(
                "counter",
                "Requests that went on to another model, by the failure that sent them there.",
                ["model", "to", "failure"],
                [(list(key), count) for key, count in self._fallbacks.items()],
            ),
            "headgate_shadow_requests_total": Samples(
                "counter",
                "Copies of requests, by the model that got them and how they ended.",
                ["model", "ended"],
                [(list(key), count) for key, count in self._shadows.items()],
            ),
            "headgate_shadow_cost_nanousd_total": Samples(
                "counter",
                "Known cost of copies of requests in nano-dollars; in the ledger under the key `shadow`.",
                ["model"],
                [([model], cost) for model, cost in self._shadow_cost_nanousd.items()],
            ),
        }

    def _gen_ai_samples(self) -> Snapshot:
        families = {
            name: Samples("histogram", help_text, list(_GEN_AI), [], list(bounds))
            for name, (_, bounds, help_text) in _GEN_AI_HISTOGRAMS.items()
        }
        tokens = Samples(
            "histogram",
            "Tokens per request; `input` is the whole prompt, cached or not.",
            [*_GEN_AI, "gen_ai_token_type"],
            [],
            list(TOKEN_BOUNDS),
        )
        for key, series in self._series.items():
            for name, (attribute, _, _) in _GEN_AI_HISTOGRAMS.items():
                families[name].samples.append((list(key), getattr(series, attribute).sample()))
            tokens.samples.append(([*key, "input"], series.input.sample()))
            tokens.samples.append(([*key, "output"], series.output.sample()))
        return families | {"gen_ai_client_token_usage": tokens}

    def _money_samples(self) -> Snapshot:
        families = {
            name: Samples("counter", help_text, list(_MODEL), [])
            for name, (_, help_text) in _MONEY_COUNTERS.items()
        }
        tokens = Samples(
            "counter",
            "Tokens by bucket. The buckets are disjoint, but `reasoning` is a part of `output`.",
            [*_MODEL, "bucket"],
            [],
        )
        for (_, provider, model), series in self._series.items():
            for name, (attribute, _) in _MONEY_COUNTERS.items():
                families[name].samples.append(([provider, model], getattr(series, attribute)))
            for bucket in ("input", "cache_read", "cache_write", "output", "reasoning"):
                tokens.samples.append(([provider, model, bucket], getattr(series, f"{bucket}_tokens")))
        return families | {"headgate_tokens_total": tokens}


def _read_watched(watched: _Watched) -> Samples:
    value = watched.read()
    samples: list[tuple[list[str], int | float | list[int | float]]]
    samples = (
        [(_listed(name), each) for name, each in value.items()]
        if isinstance(value, Mapping)
        else [([], value)]
    )
    return Samples(watched.kind, watched.help, _listed(watched.label) if watched.label else [], samples)


def _listed(labels: str | tuple[str, ...]) -> list[str]:
    return [labels] if isinstance(labels, str) else list(labels)
