"""What an engine says of its own load: its `/metrics` page, or vLLM's `/load`, read for the few figures that matter.

Knows the names, not the HTTP. The page has thousands of lines, so it is searched, not parsed.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Final, NamedTuple

import msgspec

_SAMPLE: Final = re.compile(rb"(?:\{([^}\n]*)\})? +([0-9.eE+-]+)\s*(?:\n|$)")
_ENGINE: Final = re.compile(rb'(?:^|,)engine="(\d{1,6})"')


class EngineLoad(NamedTuple):
    """Of one engine (data-parallel rank), or of all behind an address. `kv_usage` is a share of its KV memory, 0..1."""

    running: int
    waiting: int
    kv_usage: float

    def __add__(self, other: object) -> "EngineLoad":
        """Of two together; as full as the fuller."""
        if not isinstance(other, EngineLoad):
            return NotImplemented
        return EngineLoad(
            self.running + other.running, self.waiting + other.waiting, max(self.kv_usage, other.kv_usage)
        )


class _Names(NamedTuple):
    """What a kind of engine calls its load. `kv`: as many names as it has had."""

    running: bytes
    waiting: bytes
    kv: tuple[bytes, ...] = ()


_KINDS: Final = (
    _Names(
        b"vllm:num_requests_running",
        b"vllm:num_requests_waiting",
        (b"vllm:kv_cache_usage_perc", b"vllm:gpu_cache_usage_perc"),
    ),
    _Names(b"sglang:num_running_reqs", b"sglang:num_queue_reqs", (b"sglang:token_usage",)),
    _Names(
        b"llamacpp:requests_processing", b"llamacpp:requests_deferred", (b"llamacpp:kv_cache_usage_ratio",)
    ),
    _Names(b"tgi_batch_current_size", b"tgi_queue_size"),
)


class EngineTotals(NamedTuple):
    """What one engine has done since its start. Tokens of prompts looked for in its prefix cache, and found there."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0
    finished: int = 0  # requests

    def __add__(self, other: object) -> "EngineTotals":
        if not isinstance(other, EngineTotals):
            return NotImplemented
        return EngineTotals(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    @property
    def computed_tokens(self) -> int:
        """Of prompts."""
        return self.prompt_tokens - self.hit_tokens


_MOST: Final = 1e9
_MOST_TOTAL: Final = 1e18
_NOTHING: Final = EngineLoad(0, 0, 0.0)
_TOTALS: Final = (
    b"prompt_tokens_total",
    b"generation_tokens_total",
    b"prefix_cache_queries_total",
    b"prefix_cache_hits_total",
    b"request_success_total",
)


class _ServerLoad(msgspec.Struct):
    server_load: int


_SERVER_LOAD: Final = msgspec.json.Decoder(_ServerLoad)


def read_metrics(page: bytes) -> dict[int, EngineLoad]:
    """By the `engine` label (0 where there is none); empty if this is no engine's page. Several models add up."""
    for names in _KINDS:
        loads = _read(page, names)
        if loads:
            return loads
    return {}


def _read(page: bytes, names: _Names) -> dict[int, EngineLoad]:
    loads: dict[int, EngineLoad] = {}
    for engine, value in _samples(page, names.running):
        loads[engine] = loads.get(engine, _NOTHING) + EngineLoad(int(value), 0, 0.0)
    for engine, value in _samples(page, names.waiting):
        loads[engine] = loads.get(engine, _NOTHING) + EngineLoad(0, int(value), 0.0)
    for name in names.kv:
        for engine, value in _samples(page, name):
            loads[engine] = loads.get(engine, _NOTHING) + EngineLoad(0, 0, min(max(value, 0.0), 1.0))
    return loads


def read_totals(page: bytes) -> dict[int, EngineTotals]:
    """By the `engine` label, like `read_metrics`."""
    totals: dict[int, list[int]] = {}
    for place, name in enumerate(_TOTALS):
        for engine, value in _samples(page, b"vllm:" + name, _MOST_TOTAL):
            totals.setdefault(engine, [0] * len(_TOTALS))[place] += int(value)
    return {engine: EngineTotals(*values) for engine, values in totals.items()}


def _samples(page: bytes, name: bytes, most: float = _MOST) -> Iterator[tuple[int, float]]:
    at = page.find(name)
    while at >= 0:
        at += len(name)
        sample = _SAMPLE.match(page, at)  # not of a series whose name only begins so, and no comment
        if sample is not None:
            engine = _ENGINE.search(sample[1] or b"")
            with contextlib.suppress(ValueError):
                yield int(engine[1]) if engine else 0, min(float(sample[2]), most)
        at = page.find(name, at)


def read_load(body: bytes) -> EngineLoad | None:
    """Of `/load`, which counts requests and nothing else (and only with `--enable-server-load-tracking`)."""
    try:
        return EngineLoad(max(0, _SERVER_LOAD.decode(body).server_load), 0, 0.0)
    except msgspec.DecodeError:
        return None
