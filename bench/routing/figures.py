"""Figures out of a run's record, and its price by the product's own rate cards."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from backends.usage import Usage
from bench.routing.simulation import Record
from policies.cost import charge
from policies.prices import PriceBook


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one run. Times in seconds; `balance` is the fullest replica's mean load over the mean of all."""

    requests: int
    per_s: float
    hit_rate: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    total_p50: float
    balance: float
    momentary_p50: float  # max/mean in flight, sampled
    momentary_p99: float
    moved: float
    preemptions: int
    output_per_s: float

    @classmethod
    def of(cls, record: Record) -> Figures:
        ttft = np.asarray(record.ttft_s)
        loads = np.asarray([load for load in record.mean_in_flight if load > 0])
        p50, p90, p99 = np.quantile(ttft, (0.5, 0.9, 0.99))
        momentary_p50, momentary_p99 = np.quantile(record.imbalance or [1.0], (0.5, 0.99))
        return cls(
            requests=len(ttft),
            per_s=len(ttft) / record.seconds,
            hit_rate=sum(record.cached_tokens) / sum(record.prompt_tokens),
            ttft_p50=float(p50),
            ttft_p90=float(p90),
            ttft_p99=float(p99),
            total_p50=float(np.median(record.total_s)),
            balance=float(loads.max() / loads.mean()),
            momentary_p50=float(momentary_p50),
            momentary_p99=float(momentary_p99),
            moved=record.moved / max(1, record.continued),
            preemptions=record.preemptions,
            output_per_s=sum(record.output_tokens) / record.seconds,
        )

    @classmethod
    def mean(cls, runs: list[Figures]) -> Figures:
        """Of several seeds, figure by figure."""
        values = {}
        for name in cls.__dataclass_fields__:
            mean = float(np.mean([getattr(run, name) for run in runs]))
            values[name] = round(mean) if name in {"requests", "preemptions"} else mean
        return cls(**values)  # type: ignore[arg-type]  # a mapping of mixed figures


def cost_usd(record: Record, provider: str, model: str) -> tuple[float, float]:
    """What the requests cost at the public price of this model, and what their answers alone cost."""
    price = PriceBook().price(provider, model)
    total = answers = 0
    for prompt, cached, output in zip(
        record.prompt_tokens, record.cached_tokens, record.output_tokens, strict=True
    ):
        usage = Usage(input_tokens=prompt - cached, cache_read_tokens=cached, output_tokens=output)
        for said, is_all in ((usage, True), (Usage(output_tokens=output), False)):
            charged = charge(said, price, "", 0.0)
            if charged is None:
                raise ValueError(f"the price of {model} is not known")
            if is_all:
                total += charged.cost_nanousd
            else:
                answers += charged.cost_nanousd
    return total / 1e9, answers / 1e9
