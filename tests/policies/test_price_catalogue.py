"""The rate card against the package that it was compiled from."""

import random
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal

import genai_prices
import pytest
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelPrice, PriceCalculation, TieredPrices
from hypothesis import given
from hypothesis import strategies as st

from backends.dialect import CHAT, MESSAGES
from backends.usage import Usage
from policies.cost import charge
from policies.price_catalogue import find, names
from policies.prices import Price, PriceBook
from tests.support.answers import usages
from tests.support.properties import STEADY


def cost_nanousd(*of):
    charged = charge(*of)
    return None if charged is None else charged.cost_nanousd


CONTEXTS = {
    "": None,
    "default": {"service_tier": "default"},
    "batch": {"processing": "batch"},
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
}
MAKERS = ("openai", "anthropic", "google", "groq", "mistral", "deepseek", "x-ai", "moonshotai", "openrouter")
MODELS = {maker.id: [model.id for model in maker.models] for maker in get_snapshot().providers}
TIMES = st.integers(
    int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()), int(datetime(2027, 3, 1, tzinfo=UTC).timestamp())
)
BOOK = PriceBook()


def ask_the_package(maker: str, model: str, usage: Usage, tier: str, at_time: float) -> PriceCalculation:
    return genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=usage.prompt_tokens,
            cache_read_tokens=usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
            cache_write_5m_tokens=usage.cache_write_5m_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
            output_tokens=usage.output_tokens,
            output_reasoning_tokens=usage.reasoning_tokens,
            input_audio_tokens=usage.input_audio_tokens + usage.cache_read_audio_tokens,
            cache_audio_read_tokens=usage.cache_read_audio_tokens,
            output_audio_tokens=usage.output_audio_tokens,
        ),
        model,
        provider_id=maker,
        genai_request_timestamp=datetime.fromtimestamp(at_time, UTC),
        price_context=CONTEXTS[tier],
    )


def is_finer_than_the_card(price: ModelPrice) -> bool:
    """The list has prices like 0.0833333333333333, out of somebody's division."""
    rates = [value for value in vars(price).values() if value is not None]
    flat = [
        x
        for v in rates
        for x in ([v.base, *(t.price for t in v.tiers)] if isinstance(v, TieredPrices) else [v])
    ]
    return any(rate * 10**9 % 1 for rate in flat)


def compare(maker: str, model: str, usage: Usage, tier: str, at_time: float) -> bool:
    """Asserts that both say the same, to the nano-dollar. False if the model has no price here."""
    price = BOOK.price(maker, model)
    if price.card is None:
        return False
    rates = price.card.rates(usage.prompt_tokens, tier, at_time)
    if rates is None:
        return False
    if not rates.has_output:
        usage = Usage(usage.input_tokens, usage.cache_read_tokens)
    if not rates.has_input:
        usage = Usage(output_tokens=usage.output_tokens)
    theirs = ask_the_package(maker, model, usage, tier, at_time)
    expected = int((theirs.total_price * 10**9).quantize(Decimal(1), ROUND_HALF_EVEN))
    ours = cost_nanousd(usage, price, tier, at_time)
    assert ours is not None
    assert abs(ours - expected) <= is_finer_than_the_card(theirs.model_price), (
        maker,
        model,
        usage,
        tier,
        at_time,
    )
    return True


@pytest.mark.parametrize("maker", MAKERS)
@STEADY
@given(data=st.data())
def test_a_card_prices_any_usage_as_the_package_does(maker, data):
    usage = data.draw(usages(data.draw(st.sampled_from([CHAT, MESSAGES]))))
    compare(
        maker,
        data.draw(st.sampled_from(MODELS[maker])),
        usage,
        data.draw(st.sampled_from(list(CONTEXTS))),
        data.draw(TIMES),
    )


def test_every_model_of_the_list_is_priced_as_the_package_does():
    chance = random.Random(11)
    compared = 0
    for maker, models in MODELS.items():
        for model in models * 3:
            sizes = [chance.choice([0, 7, 3_000, 90_000, 210_000]) for _ in range(5)]
            usage = Usage(*sizes, sizes[4] // 3, sizes[0] // 2, sizes[1] // 3, sizes[4] // 4)
            at_time = chance.randrange(1_700_000_000, 1_805_000_000)
            compared += compare(maker, model, usage, chance.choice(list(CONTEXTS)), at_time)
    assert compared > 6_000


@pytest.mark.parametrize(
    ("maker", "model", "usage", "nanousd"),
    [
        ("openai", "gpt-5", Usage(2_000, 8_000, output_tokens=100), 4_500_000),
        ("anthropic", "claude-sonnet-4-5", Usage(0, 50_000, 10_000, 20_000, 5_000), 247_500_000),
    ],
)
def test_known_sums(maker, model, usage, nanousd):
    assert cost_nanousd(usage, BOOK.price(maker, model), "", 1_760_000_000.0) == nanousd


def test_a_long_prompt_costs_the_higher_rate_for_all_its_tokens():
    price = BOOK.price("google", "gemini-2.5-pro")
    at_the_edge = cost_nanousd(Usage(100_000, 100_000), price, "", 1_760_000_000.0)
    beyond = cost_nanousd(Usage(100_001, 100_000), price, "", 1_760_000_000.0)
    assert (at_the_edge, beyond) == (137_500_000, 275_002_500)


@pytest.mark.parametrize(
    ("maker", "model"),
    [("openai", "gpt-5"), ("anthropic", "claude-opus-4-6"), ("google", "gemini-2.5-flash")],
)
def test_batch_is_cheaper_and_an_unknown_tier_is_not(maker, model):
    price = BOOK.price(maker, model)
    standard, batch, odd = (
        cost_nanousd(Usage(10_000), price, t, 1_795_000_000.0) for t in ("", "batch", "turbo")
    )
    assert batch == standard // 2
    assert odd == standard


def test_another_sellers_model_has_none_of_its_makers_service_tiers():
    usage, at_time = Usage(10_000, output_tokens=10), 1_795_000_000.0
    lent = [model for model in MODELS["openai"] if model not in MODELS["azure"] and find("azure", model)]
    assert lent
    for model in lent:
        for tier in CONTEXTS:
            compare("azure", model, usage, tier, at_time)


def test_off_peak_hours_have_their_own_price():
    price = BOOK.price("deepseek", "deepseek-v4-flash")
    midnight = 1_795_000_000 // 86_400 * 86_400
    by_hour = {
        hour: cost_nanousd(Usage(10_000), price, "", midnight + 3_600 * hour) for hour in (0, 1, 4, 6, 10)
    }
    assert by_hour[1] == by_hour[6] > by_hour[0] == by_hour[4] == by_hour[10]


def test_free_variants_are_free_and_models_without_prices_are_unknown():
    assert BOOK.price("openrouter", "deepseek/deepseek-r1:free") == Price(
        "free", BOOK.price("openai", "gpt-5").source
    )
    assert BOOK.price("github-copilot", "gpt-4o").kind == "unknown"
    assert BOOK.price("openai", "whisper-1").kind == "unknown"


def test_what_a_card_leaves_out_is_named():
    listing = find("anthropic", "claude-sonnet-4-5")
    assert listing is not None
    assert listing.gaps == ("web_searches_kcount",)


def test_a_request_may_cost_by_itself():
    price = BOOK.price("perplexity", "sonar")
    assert price.card is not None
    assert price.card.rates(0, "", 1_760_000_000.0).request > 0


def test_names_nobody_lists_are_not_found():
    assert find("openai", "no-such-model") is None
    assert find("no-such-provider", "gpt-5") is None
    assert find("openai", "") is None


def test_the_names_of_a_seller_are_its_current_models():
    assert {"gpt-5", "text-embedding-3-small"} <= set(names("openai"))
    assert names("no-such-provider") == names("") == []
