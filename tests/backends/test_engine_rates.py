"""How fast engines work, from their own totals; and the totals on the page."""

import pytest

from backends.engine_load import EngineTotals, read_totals
from backends.engine_rates import EngineHistory

PAGE = b"""\
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 7.0
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 5.0
vllm:generation_tokens_total{engine="0",model_name="m"} 1.5e+03
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 90.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 60.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="m"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="m"} 4.0
vllm:request_success_created{engine="0",finished_reason="length",model_name="m"} 1.7e+09
"""


def test_totals_are_read_by_engine():
    totals = read_totals(PAGE)
    assert totals == {0: EngineTotals(100, 1500, 90, 60, 7), 1: EngineTotals(7, 0, 0, 0, 0)}
    assert totals[0].computed_tokens == 40
    assert read_totals(b"") == {}


def test_rates_are_of_the_last_seconds_by_engine_or_together():
    history = EngineHistory()
    assert history.rates(None) is None
    for second in range(30):
        totals = {
            0: EngineTotals(100 * second, 10 * second, 100 * second, 50 * second),
            1: EngineTotals(generation_tokens=5 * second),
        }
        history.observe(float(second), totals)
    assert history.rates(0) == pytest.approx((100, 10, 0.5))
    assert history.rates(1) == (0, 5, None)
    assert history.rates(None) == pytest.approx((100, 15, 0.5))
    assert history.latest(0).prompt_tokens == 2900


def test_an_engine_that_began_again_begins_again_here():
    history = EngineHistory()
    history.observe(0.0, {0: EngineTotals(1000)})
    history.observe(1.0, {0: EngineTotals(2000)})
    history.observe(2.0, {0: EngineTotals(10)})
    assert history.rates(0) is None
    history.observe(3.0, {0: EngineTotals(30)})
    assert history.rates(0).prompt_tokens_per_s == 20
    assert EngineHistory().latest(None) == EngineTotals()
