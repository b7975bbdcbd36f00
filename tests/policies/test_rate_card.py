from decimal import Decimal

from policies.rate_card import ANY_PROMPT, STANDARD, Period, RateCard, Rates, compile_steps, nanousd

DAY = 86_400.0


def ladders(**prices: str) -> dict:
    return {bucket: [(ANY_PROMPT, Decimal(price))] for bucket, price in prices.items()}


def rates(**prices: str) -> Rates:
    steps = compile_steps(ladders(**prices))
    assert steps is not None
    return steps[-1][1]


def test_rates_are_nano_dollars_per_million_tokens():
    assert rates(input="0.0375", output="10")[:5] == (
        37_500_000,
        37_500_000,
        37_500_000,
        37_500_000,
        10_000_000_000,
    )


def test_rates_finer_than_a_nano_dollar_are_rounded_half_to_even():
    assert [nanousd(Decimal(text)) for text in ("0.0833333333333333", "0.0000000005", "0.0000000015")] == [
        83_333_333,
        0,
        2,
    ]


def test_a_kind_of_token_without_a_price_costs_what_it_is_a_kind_of():
    plain = rates(input="2", output="8")
    assert (
        plain.cache_read == plain.cache_write_5m == plain.cache_write_1h == plain.input_audio == plain.input
    )
    assert plain.reasoning == plain.output_audio == plain.output
    assert rates(input="2", cache_write="3").cache_write_1h == 3_000_000_000


def test_cached_audio_is_cached_if_there_is_a_price_for_that_and_audio_if_not():
    assert rates(input="2", cache_read="1", input_audio="9").cache_read_audio == 1_000_000_000
    assert rates(input="2", input_audio="9").cache_read_audio == 9_000_000_000
    assert (
        rates(input="2", cache_read="1", input_audio="9", cache_read_audio="4").cache_read_audio
        == 4_000_000_000
    )


def test_without_input_and_output_there_is_no_price():
    assert compile_steps(ladders(request="1")) is None
    assert compile_steps({}) is None


def test_the_whole_prompt_picks_the_step():
    steps = compile_steps({"input": [(ANY_PROMPT, Decimal(1)), (200_000, Decimal(2)), (500_000, Decimal(4))]})
    card = RateCard([Period(0.0, 0.0, {STANDARD: steps})])
    at = {n: card.rates(n, "", 0.0).input // 10**9 for n in (0, 200_000, 200_001, 500_000, 500_001)}
    assert at == {0: 1, 200_000: 1, 200_001: 2, 500_000: 2, 500_001: 4}


def test_a_tier_without_a_price_of_its_own_costs_the_standard_one():
    cards = {STANDARD: compile_steps(ladders(input="2")), "flex": compile_steps(ladders(input="1"))}
    card = RateCard([Period(0.0, 0.0, cards)])
    tiers = ("", "default", "standard", "auto", "priority", "flex")
    assert [card.rates(1, tier, 0.0).input // 10**9 for tier in tiers] == [2, 2, 2, 2, 2, 1]


def test_prices_change_by_day_and_by_time_of_day():
    def period(start_time, start_s, price):
        return Period(start_time, start_s, {STANDARD: compile_steps(ladders(input=price))})

    card = RateCard(
        [
            period(10 * DAY, 3_600.0, "4"),
            period(0.0, 0.0, "1"),
            period(0.0, 3_600.0, "2"),
            period(10 * DAY, 0.0, "3"),
        ]
    )
    moments = (-5.0, 0.0, 3_599.9, 3_600.0, DAY - 1, DAY, 10 * DAY - 1, 10 * DAY, 11 * DAY + 3_600)
    assert [card.rates(1, "", at).input // 10**9 for at in moments] == [2, 1, 1, 2, 2, 1, 2, 3, 4]


def test_the_hash_is_that_of_the_content_and_stays_the_same():
    def card(price):
        return RateCard([Period(0.0, 0.0, {STANDARD: compile_steps(ladders(input=price))})])

    assert card("2").hash == card("2.000").hash
    assert card("2").hash != card("2.1").hash
    assert card("2").hash == "1172487a40a6"  # in ledgers out there


def test_a_card_of_zeros_is_free():
    def card(*prices):
        cards = {str(n): compile_steps(ladders(input=price, output=price)) for n, price in enumerate(prices)}
        return RateCard([Period(0.0, 0.0, cards)])

    assert card("0", "0").is_free
    assert not card("0", "0.1").is_free
