from decimal import Decimal

import pytest
import yaml
from pydantic import ValidationError

from policies.price_config import PriceConfig
from policies.rate_card import Rates


def price(text: str) -> PriceConfig:
    return PriceConfig.model_validate(yaml.safe_load(text))


def rates(text: str, prompt_tokens: int = 1, tier: str = "") -> Rates:
    found = price(text).card().rates(prompt_tokens, tier, 0.0)
    assert found is not None
    return found


def complaint(text: str) -> str:
    with pytest.raises(ValidationError) as refusal:
        price(text)
    return str(refusal.value)


def test_prices_are_dollars_per_million_tokens():
    assert rates(
        "{input: 2.5, cached_input: 0.25, cache_write: 3, cache_write_1h: 5, output: 10, reasoning: 12}"
    )[:6] == (
        2_500_000_000,
        250_000_000,
        3_000_000_000,
        5_000_000_000,
        10_000_000_000,
        12_000_000_000,
    )


@pytest.mark.parametrize("written", ["0.0375", "'0.0375'", "3.75e-2", "'3.75e-2'", "3.75e-02"])
def test_a_number_is_what_is_written_not_its_binary_float(written):
    assert price(f"input: {written}").input == Decimal("0.0375")
    assert rates(f"input: {written}").input == 37_500_000


def test_cached_tokens_without_a_price_cost_the_input_price_never_nothing():
    assert rates("{input: 2, output: 8}").cache_read == 2_000_000_000


def test_cache_read_is_another_name_for_cached_input():
    assert price("{input: 2, cache_read: 1}") == price("{input: 2, cached_input: 1}")


def test_audio_and_requests_have_prices_too():
    found = rates(
        "{input: 2, output: 8, input_audio: 40, cached_input_audio: 4, output_audio: 80, per_request: 0.005}"
    )
    assert found[6:10] == (40_000_000_000, 4_000_000_000, 80_000_000_000, 5_000_000 * 10**6)


def test_tiers_replace_only_the_prices_they_name():
    text = "{input: 1, cached_input: 0.1, output: 4, tiers: [{above: 200000, input: 2, output: 6}]}"
    assert rates(text, 200_000).input == 1_000_000_000
    assert rates(text, 200_001)[:5:4] == (2_000_000_000, 6_000_000_000)
    assert rates(text, 200_001).cache_read == 100_000_000


def test_a_service_tier_is_a_factor_or_prices_or_both():
    text = """
    {input: 4, cached_input: 1, output: 8, tiers: [{above: 1000, input: 6}],
     batch: 0.5, flex: {input: 3}, priority: {factor: 2, cached_input: 1.5}}
    """
    assert rates(text, 1, "batch")[:2] == (2_000_000_000, 500_000_000)
    assert rates(text, 2_000, "batch").input == 3_000_000_000
    assert rates(text, 2_000, "flex")[:2] == (3_000_000_000, 1_000_000_000)
    assert rates(text, 1, "priority")[:2] == (8_000_000_000, 1_500_000_000)
    assert rates(text, 1, "default").input == 4_000_000_000


def test_the_names_of_litellm_mean_the_same():
    theirs = """
    input_cost_per_token: 1.25e-06
    cache_read_input_token_cost: 1.25e-07
    cache_creation_input_token_cost: "0.0000015625"
    cache_creation_input_token_cost_above_1hr: 2.5e-06
    output_cost_per_token: 0.00001
    output_cost_per_reasoning_token: null
    input_cost_per_token_above_200k_tokens: 2.5e-06
    cache_creation_input_token_cost_above_1hr_above_200k_tokens: 5e-06
    output_cost_per_token_above_200k_tokens: 0.000015
    input_cost_per_token_batches: 6.25e-07
    input_cost_per_token_flex: 6e-07
    input_cost_per_token_priority: 2.5e-06
    input_cost_per_token_above_200k_tokens_priority: 5e-06
    """
    ours = """
    {input: 1.25, cached_input: 0.125, cache_write: 1.5625, cache_write_1h: 2.5, output: 10,
     tiers: [{above: 200000, input: 2.5, cache_write_1h: 5, output: 15}],
     batch: {input: 0.625}, flex: {input: 0.6}, priority: {input: 2.5, tiers: [{above: 200000, input: 5}]}}
    """
    assert price(theirs).card().hash == price(ours).card().hash


def test_a_free_model_says_so():
    assert price("free: true").free


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "needs `input`"),
        ("{output: 3}", "needs `input`"),
        ("{free: true, input: 1}", "a free model has no prices"),
        ("{input: 1, inptu: 2}", "inptu"),
        ("{input: -1}", "zero or more"),
        ("{input: .nan}", "zero or more"),
        ("{input: .inf}", "zero or more"),
        ("{input: true}", "is not a number"),
        ("{input: $2}", "is not a number"),
        ("{input: [2]}", "is not a number"),
        ("{input: 0.0000000000025}", "per million tokens"),
        ("{input: 25000000}", "per million tokens"),
        ("{input: 1, cache_read: 2, cached_input: 2}", "`cached_input` say the same thing twice"),
        ("{input: 1, input_cost_per_token: 0.000001}", "say the same thing twice"),
        ("{input: 1, batch: 0.5, input_cost_per_token_batches: 1e-7}", "`batch` say the same thing twice"),
        ("{input_cost_per_token: much}", "`input_cost_per_token` is not a number"),
        ("{input: 1, batch: 50000}", "a factor on the standard prices"),
        ("{input: 1, batch: {inptu: 2}}", "batch.inptu"),
        ("{input: 1, tiers: [{input: 2}]}", "tiers.0.above"),
        ("{input: 1, tiers: [{above: -1}]}", "tiers.0.above"),
        (
            "{input: 1, input_cost_per_token_above_200k_tokens_per_day: 2}",
            "input_cost_per_token_above_200k_tokens_per_day",
        ),
        ("{input: 1, tiers: [{above: 5, input: 2}, {above: 5, output: 2}]}", "the same `above`"),
        ("2.50", "dictionary"),
    ],
)
def test_a_mistake_is_told_where_it_is(text, says):
    assert says in complaint(text)


def test_the_schema_knows_the_names_of_litellm():
    schema = PriceConfig.model_json_schema()
    (pattern,) = schema["patternProperties"]
    assert "cache_read_input_token_cost" in pattern
    assert schema["additionalProperties"] is False
