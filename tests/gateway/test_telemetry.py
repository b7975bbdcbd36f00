import time
from types import SimpleNamespace

import pytest

from backends.dialect import CHAT, COUNT_TOKENS, EMBEDDINGS, MESSAGES
from backends.usage import Usage
from gateway.telemetry import MAX_UNLISTED_MODELS, STAGE_BOUNDS, Histogram, Telemetry
from policies.exchange import Exchange

USAGE = Usage(
    input_tokens=100, cache_read_tokens=2000, cache_write_5m_tokens=7, output_tokens=65, reasoning_tokens=5
)


def an_exchange(
    model: str | None = "m", *, dialect=CHAT, provider="openai", status=200, **fields
) -> Exchange:
    """A request that took: 1 ms read, 2 ms placed, 300 ms upstream, 700 ms relayed."""
    exchange = Exchange("req_1", dialect, 100.0, time.time())
    exchange.read_at = 100.001
    exchange.dispatched_at = 100.003
    exchange.first_byte_at = 100.303
    exchange.ready_at = 100.303
    exchange.relayed_at = 100.3031
    exchange.attempts = 1
    exchange.status = status
    exchange.ended = "completed"
    exchange.usage = USAGE
    exchange.cost_nanousd = 12_345
    exchange.candidate = SimpleNamespace(endpoint=SimpleNamespace(provider=SimpleNamespace(name=provider)))
    exchange.model = SimpleNamespace(name=model) if model is not None else None
    for name, value in fields.items():
        setattr(exchange, name, value)
    exchange.end(exchange.ended_at or 101.003)
    return exchange


def values(telemetry: Telemetry, family: str) -> dict[tuple[str, ...], object]:
    return {tuple(labels): value for labels, value in telemetry.snapshot()[family].samples}


def count(histogram: object) -> int:
    assert isinstance(histogram, list)
    return sum(histogram[:-1])


def test_a_value_on_a_bound_is_counted_below_it_and_beyond_the_last_in_the_overflow():
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 3.0):
        histogram.observe(value)
    assert histogram.sample() == [2, 1, 1, 6.0]


def test_every_request_is_in_a_bucket_however_many_there_were_since_the_last_look():
    telemetry = Telemetry()
    for _ in range(1000):
        telemetry.observe(an_exchange())
    assert count(values(telemetry, "headgate_overhead_seconds")[()]) == 1000
    telemetry.observe(an_exchange())
    [duration] = values(telemetry, "gen_ai_server_request_duration_seconds").values()
    assert count(duration) == 1001


def test_requests_are_counted_by_dialect_end_and_class_of_status():
    telemetry = Telemetry()
    telemetry.observe(an_exchange())
    telemetry.observe(an_exchange(status=201))
    telemetry.observe(an_exchange(dialect=MESSAGES, status=0, ended="client_gone"))
    assert values(telemetry, "headgate_requests_total") == {
        ("chat", "completed", "2xx"): 2,
        ("messages", "client_gone", "none"): 1,
    }


def test_each_stage_is_timed_and_the_gateways_own_share_apart():
    telemetry = Telemetry()
    telemetry.observe(an_exchange())
    stages = values(telemetry, "headgate_stage_seconds")
    sums = {name: histogram[-1] for (name,), histogram in stages.items()}
    assert sums["read"] == pytest.approx(0.001)
    assert sums["place"] == pytest.approx(0.002)
    assert sums["send"] == pytest.approx(0.3)
    assert sums["relay"] == pytest.approx(0.7)
    overhead = values(telemetry, "headgate_overhead_seconds")[()]
    assert overhead[-1] == pytest.approx(0.0021)
    assert len(overhead) == len(STAGE_BOUNDS) + 2


def test_a_refused_request_counts_no_upstream_time_and_no_model():
    telemetry = Telemetry()
    refused = an_exchange(
        dispatched_at=0.0, first_byte_at=0.0, relayed_at=0.0, status=401, ended="denied", usage=None
    )
    telemetry.observe(refused)
    assert count(values(telemetry, "headgate_stage_seconds")[("send",)]) == 0
    assert values(telemetry, "gen_ai_server_request_duration_seconds") == {}


def test_refusals_are_counted_by_their_code():
    telemetry = Telemetry()
    for code in ("budget_exceeded", "key_unknown", "budget_exceeded"):
        telemetry.observe(an_exchange(status=429, ended="denied", error_kind=code, dispatched_at=0.0))
    telemetry.observe(an_exchange(status=400, ended="invalid", dispatched_at=0.0))
    assert values(telemetry, "headgate_denials_total") == {("budget_exceeded",): 2, ("key_unknown",): 1}


def test_the_gen_ai_families_use_the_conventions_names():
    telemetry = Telemetry()
    telemetry.list_models(["m"])
    telemetry.observe(an_exchange(is_stream=True))
    telemetry.observe(an_exchange(dialect=MESSAGES))
    telemetry.observe(an_exchange(dialect=EMBEDDINGS))
    tokens = values(telemetry, "gen_ai_client_token_usage")
    assert tokens[("chat", "openai", "m", "input")][-1] == 2 * 2107
    assert tokens[("chat", "openai", "m", "output")][-1] == 2 * 65
    assert count(tokens[("embeddings", "openai", "m", "input")]) == 1
    first = values(telemetry, "gen_ai_server_time_to_first_token_seconds")[("chat", "openai", "m")]
    assert count(first) == 1
    assert first[-1] == pytest.approx(0.3031)
    per_token = values(telemetry, "gen_ai_server_time_per_output_token_seconds")[("chat", "openai", "m")]
    assert per_token[-1] == pytest.approx(0.6999 / 64)


def test_tokens_are_counted_in_disjoint_buckets():
    telemetry = Telemetry()
    telemetry.list_models(["m"])
    telemetry.observe(an_exchange())
    assert values(telemetry, "headgate_tokens_total") == {
        ("openai", "m", "input"): 100,
        ("openai", "m", "cache_read"): 2000,
        ("openai", "m", "cache_write"): 7,
        ("openai", "m", "output"): 65,
        ("openai", "m", "reasoning"): 5,
    }


def money(telemetry: Telemetry) -> dict[str, int]:
    names = ("billed", "priced", "zero_cost", "unknown_price", "unknown_usage", "estimated")
    return {name: sum(values(telemetry, f"headgate_{name}_requests_total").values()) for name in names}


def test_unknown_prices_unknown_usage_and_zero_costs_are_each_counted():
    telemetry = Telemetry()
    telemetry.observe(an_exchange())
    telemetry.observe(an_exchange(cost_nanousd=0))
    telemetry.observe(an_exchange(cost_nanousd=None))
    telemetry.observe(an_exchange(cost_nanousd=None, usage=None))
    telemetry.observe(an_exchange(is_estimated=True, ended="client_gone", status=499))
    assert money(telemetry) == {
        "billed": 5, "priced": 3, "zero_cost": 1, "unknown_price": 1, "unknown_usage": 1, "estimated": 1,
    }  # fmt: skip
    assert sum(values(telemetry, "headgate_cost_nanousd_total").values()) == 24_690


def test_answers_nobody_charges_for_are_not_billed():
    telemetry = Telemetry()
    telemetry.observe(an_exchange(status=500, usage=None, cost_nanousd=0))
    telemetry.observe(an_exchange(dialect=COUNT_TOKENS, cost_nanousd=0))
    assert money(telemetry)["billed"] == 0


def test_a_model_the_catalog_does_not_list_is_a_label_only_once_an_upstream_served_it():
    telemetry = Telemetry()
    telemetry.list_models(["m"])
    telemetry.observe(an_exchange("made-up", status=404, usage=None))
    telemetry.observe(an_exchange("served"))
    telemetry.observe(an_exchange("served", status=404, usage=None))
    labels = {key[2] for key in values(telemetry, "gen_ai_server_request_duration_seconds")}
    assert labels == {"other", "served"}


def test_the_number_of_model_labels_is_bounded():
    telemetry = Telemetry()
    for number in range(MAX_UNLISTED_MODELS + 50):
        telemetry.observe(an_exchange(f"model-{number}"))
    labels = {key[2] for key in values(telemetry, "gen_ai_server_request_duration_seconds")}
    assert len(labels) == MAX_UNLISTED_MODELS + 1
    assert "other" in labels


def test_failed_attempts_are_counted_by_endpoint_and_reason():
    telemetry = Telemetry()
    telemetry.attempt_failed("demo/0", "connect")
    telemetry.attempt_failed("demo/0", "connect")
    telemetry.attempt_failed("demo/1", "503")
    assert values(telemetry, "headgate_failed_attempts_total") == {
        ("demo/0", "connect"): 2,
        ("demo/1", "503"): 1,
    }


def test_what_others_count_is_read_when_metrics_are_collected():
    telemetry = Telemetry()
    rows = 1
    telemetry.watch("headgate_rows_total", "counter", "Rows.", lambda: rows)
    telemetry.watch(
        "headgate_in_flight", "gauge", "Open.", lambda: {"demo/0": 3, "demo/1": 0}, label="endpoint"
    )
    rows = 2
    snapshot = telemetry.snapshot()
    assert snapshot["headgate_rows_total"].samples == [([], 2)]
    assert values(telemetry, "headgate_in_flight") == {("demo/0",): 3, ("demo/1",): 0}
    assert snapshot["headgate_in_flight"].labels == ["endpoint"]


def test_copies_of_requests_are_counted_by_themselves_only():
    telemetry = Telemetry()
    telemetry.observe(an_exchange(is_shadow=True, model_name="new"))
    telemetry.observe(
        an_exchange(is_shadow=True, model_name="new", cost_nanousd=None, ended="upstream_failed")
    )
    assert values(telemetry, "headgate_shadow_requests_total") == {
        ("new", "completed"): 1,
        ("new", "upstream_failed"): 1,
    }
    assert values(telemetry, "headgate_shadow_cost_nanousd_total") == {("new",): 12_345}
    assert values(telemetry, "headgate_requests_total") == {}
    assert values(telemetry, "headgate_cost_nanousd_total") == {}


def test_fallbacks_are_counted_from_model_to_model():
    telemetry = Telemetry()
    for _ in range(2):
        telemetry.fell_back(an_exchange("b", fallen_from=(SimpleNamespace(name="a"),)), "timeout")
    assert values(telemetry, "headgate_fallbacks_total") == {("a", "b", "timeout"): 2}
