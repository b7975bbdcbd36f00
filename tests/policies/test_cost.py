from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialect import CHAT
from backends.tap import Tap
from backends.usage import Usage
from backends.usage_readers import read_usage
from policies.cost import charge
from policies.prices import FREE, UNKNOWN, Price, PriceBook, PriceConfig
from tests.support.answers import STREAMED, cut, stream, usages, whole
from tests.support.properties import STEADY


def cost_nanousd(*of):
    charged = charge(*of)
    return None if charged is None else charged.cost_nanousd


def saved_by_cache_nanousd(*of):
    charged = charge(*of)
    return None if charged is None else charged.saved_nanousd


BOOK = PriceBook()


def a_price(**prices) -> Price:
    return BOOK.price(None, "m", PriceConfig.model_validate(prices))


def cost(usage: Usage, price: Price, tier: str = "") -> int | None:
    return cost_nanousd(usage, price, tier, 0.0)


@pytest.mark.parametrize("dialect", STREAMED, ids=lambda d: d.name)
@STEADY
@given(data=st.data())
def test_a_streamed_answer_costs_what_the_same_answer_costs_whole(dialect, data):
    usage = data.draw(usages(dialect))
    maker, model = data.draw(
        st.sampled_from(
            [("openai", "gpt-5.6-sol"), ("anthropic", "claude-sonnet-4-5"), ("google", "gemini-2.5-pro")]
        )
    )
    price = BOOK.price(maker, model)
    tap = Tap(dialect, strips_usage=dialect.usage_on_request)
    for read in cut(b"".join(stream(dialect, usage, ["a", "b"])), data.draw(st.lists(st.integers(0, 5_000)))):
        tap.feed(read)
    reading = read_usage(dialect, whole(dialect, usage))
    assert tap.usage == reading.usage
    at_time = 1_795_000_000.0
    streamed = cost_nanousd(tap.usage, price, tap.service_tier, at_time)
    assert streamed == cost_nanousd(reading.usage, price, reading.service_tier, at_time)
    assert streamed is not None


PRICES = st.decimals(0, 200, places=4)


@STEADY
@given(usages(CHAT), *[PRICES] * 8)
def test_every_token_is_charged_once_at_its_own_price(
    usage, fresh, cached, written, out, thought, heard, hc, said
):
    price = a_price(
        input=fresh,
        cached_input=cached,
        cache_write=written,
        output=out,
        reasoning=thought,
        input_audio=heard,
        cached_input_audio=hc,
        output_audio=said,
    )
    by_hand = (
        (usage.input_tokens - usage.input_audio_tokens) * fresh
        + usage.input_audio_tokens * heard
        + (usage.cache_read_tokens - usage.cache_read_audio_tokens) * cached
        + usage.cache_read_audio_tokens * hc
        + usage.cache_write_5m_tokens * written
        + (usage.output_tokens - usage.reasoning_tokens - usage.output_audio_tokens) * out
        + usage.reasoning_tokens * thought
        + usage.output_audio_tokens * said
    )
    assert cost(usage, price) == int((by_hand * 1_000).quantize(Decimal(1), ROUND_HALF_EVEN))


def test_cached_tokens_are_billed_at_the_cached_price():
    price = a_price(input=1.25, cached_input=0.125, output=10)
    assert cost(Usage(2_000, 8_000, output_tokens=100), price) == 4_500_000


@pytest.mark.parametrize(
    ("rate", "tokens", "nano"), [("0.0005", 1, 0), ("0.0005", 3, 2), ("0.0005", 5, 2), ("0.0007", 1, 1)]
)
def test_a_request_is_rounded_once_half_to_even(rate, tokens, nano):
    assert cost(Usage(tokens), a_price(input=rate)) == nano
    assert cost(Usage(tokens, tokens, output_tokens=tokens), a_price(input=rate, output=rate)) == round(
        Decimal(rate) * 1_000 * 3 * tokens
    )


def test_the_whole_prompt_picks_the_price_cached_tokens_included():
    price = a_price(input=1, cached_input=0, output=0, tiers=[{"above": 100, "input": 2}])
    assert cost(Usage(50, 50), price) == 50_000
    assert cost(Usage(50, 51), price) == 100_000


@pytest.mark.parametrize("tier", ["", "default", "standard", "auto", "on_demand", "scale"])
def test_other_names_of_the_standard_tier_cost_the_standard_price(tier):
    assert cost(Usage(10), a_price(input=1, batch=0.5), tier) == 10_000


def test_the_tier_that_was_answered_picks_the_price():
    price = a_price(input=1, batch=0.5, flex=0.25, priority=2, fast=6)
    assert [cost(Usage(8), price, tier) for tier in ("batch", "flex", "priority", "fast")] == [
        4_000,
        2_000,
        16_000,
        48_000,
    ]


def test_a_request_may_cost_by_itself():
    assert cost(Usage(), a_price(input=1, per_request="0.005")) == 5_000_000


def test_free_is_zero_and_unknown_is_none():
    assert cost(Usage(10), FREE) == 0
    assert cost(Usage(10), UNKNOWN) is None
    assert saved_by_cache_nanousd(Usage(10, 10), FREE, "", 0.0) == 0
    assert saved_by_cache_nanousd(Usage(10, 10), UNKNOWN, "", 0.0) is None


def test_a_kind_of_token_without_a_price_makes_the_cost_unknown_only_if_it_was_used():
    embedding = a_price(input=0.02)
    assert cost(Usage(1_000), embedding) == 20_000
    assert cost(Usage(1_000, output_tokens=1), embedding) is None
    assert saved_by_cache_nanousd(Usage(1_000, output_tokens=1), embedding, "", 0.0) is None


def test_usage_of_nothing_costs_nothing():
    assert cost(Usage(), a_price(input=1, output=1)) == 0


def test_the_cache_saves_what_cached_tokens_would_have_cost_fresh():
    price = a_price(input=1, cached_input=0.1, input_audio=10, cached_input_audio=2, output=5)
    usage = Usage(100, 1_000, output_tokens=7, cache_read_audio_tokens=100)
    # 900 cached text tokens at 0.9 less each, 100 cached audio tokens at 8 less each.
    assert saved_by_cache_nanousd(usage, price, "", 0.0) == 810_000 + 800_000


def test_writing_to_the_cache_counts_against_what_it_saves():
    price = a_price(input=1, cached_input=0.1, cache_write=1.25, cache_write_1h=2)
    assert saved_by_cache_nanousd(Usage(0, 0, 1_000, 1_000), price, "", 0.0) == -250_000 - 1_000_000


@STEADY
@given(usages(CHAT))
def test_saved_and_paid_are_together_the_price_without_a_cache(usage):
    price = a_price(input=3, cached_input=1, cache_write=4, output=5, input_audio=9, cached_input_audio=2)
    plain = Usage(
        usage.prompt_tokens,
        output_tokens=usage.output_tokens,
        input_audio_tokens=usage.input_audio_tokens + usage.cache_read_audio_tokens,
    )
    saved = saved_by_cache_nanousd(usage, price, "", 0.0)
    assert cost(usage, price) + saved == cost(plain, price)
