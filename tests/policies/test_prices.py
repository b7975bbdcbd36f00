import subprocess
import sys
from decimal import Decimal

from policies.prices import FREE, UNKNOWN, PriceBook, PriceConfig


def config(**prices) -> PriceConfig:
    return PriceConfig.model_validate(prices)


def test_the_operators_price_comes_before_the_public_one():
    book = PriceBook()
    price = book.price("openai", "gpt-5", config(input=1, output=2))
    assert (price.kind, price.source) == ("known", "config")
    assert price.card is not None
    assert price.card.rates(1, "", 0.0).input == 1_000_000_000


def test_a_public_price_names_its_source_and_its_card():
    price = PriceBook().price("openai", "gpt-5")
    assert price.kind == "known"
    assert price.source.startswith("genai-prices 0.")
    assert price.card is not None
    assert price.card_hash == price.card.hash != ""


def test_declared_free_is_free_and_unpriced_is_unknown():
    book = PriceBook()
    assert book.price("openai", "gpt-5", config(free=True)) == FREE
    assert book.price("openai", "gpt-5", config(input=0, output=0)) == FREE
    assert book.price(None, "anything") == UNKNOWN
    assert book.price("openai", "no-such-model") == UNKNOWN
    assert book.price("openai", "gpt-5" * 1_000) == UNKNOWN


def test_the_same_question_gets_the_same_price():
    book = PriceBook()
    assert book.price("openai", "gpt-5").card is book.price("openai", "gpt-5").card
    assert book.price(None, "a", config(input=1)) is book.price(None, "b", config(input=1))


def test_the_public_list_is_loaded_only_when_it_is_asked():
    code = (
        "import sys; from policies.prices import PriceBook, PriceConfig; book = PriceBook();"
        "book.price(None, 'demo', PriceConfig(free=True)); assert 'genai_prices.data' not in sys.modules;"
        "book.price('openai', 'gpt-5'); assert 'genai_prices.data' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_scaled_price_scales_every_rate_and_says_so():
    book = PriceBook()
    price = book.price("openai", "gpt-5", config(input="0.0375", output=2, batch={"factor": 0.5}))
    half = price.scaled(Decimal("0.5"))
    assert half.source == "config x 0.5"
    assert half.card_hash not in {"", price.card_hash}
    for tier in ("", "batch"):
        whole, scaled = (each.card.rates(1, tier, 0.0) for each in (price, half))
        assert [rate / 2 for rate in whole[:10]] == list(scaled[:10])
        assert whole[10:] == scaled[10:]
    assert price.scaled(Decimal(1)) is price
    assert FREE.scaled(Decimal("0.5")) is FREE
    assert UNKNOWN.scaled(Decimal("0.5")) is UNKNOWN


def test_a_public_price_scales_at_every_time_and_size():
    price = PriceBook().price("openai", "gpt-5")
    third = price.scaled(Decimal("0.3"))
    for tokens in (1, 1_000_000):
        for moment in (0.0, 1_800_000_000.0):
            whole, scaled = (each.card.rates(tokens, "", moment) for each in (price, third))
            assert scaled.output == round(whole.output * 3 / 10)
