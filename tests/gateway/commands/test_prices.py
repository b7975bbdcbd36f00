import pytest

from gateway.commands.prices import price_text, usd_per_million_tokens
from policies.prices import FREE, UNKNOWN, Price, PriceBook, PriceConfig


def written(**prices) -> Price:
    return PriceBook().price(None, "m", PriceConfig.model_validate(prices))


@pytest.mark.parametrize(
    ("price", "text"),
    [
        (written(input=0.10, cached_input=0.01, output=0.40), "$0.10 in, $0.01 cached, $0.40 out"),
        (written(input=2, output="0.0375"), "$2.00 in, $2.00 cached, $0.0375 out"),
        (written(input=1500), "$1500.00 in, $1500.00 cached"),
        (written(input=1, output=0), "$1.00 in, $1.00 cached, $0.00 out"),
        (FREE, "free"),
        (UNKNOWN, "unknown"),
    ],
)
def test_a_price_is_shown_in_dollars_per_million_tokens(price, text):
    assert price_text(price.kind, usd_per_million_tokens(price, 0.0)) == text


def test_a_long_prompt_does_not_change_what_is_shown():
    price = written(input=1, output=2, tiers=[{"above": 1000, "input": 9, "output": 9}])
    assert usd_per_million_tokens(price, 0.0) == {"input": "1.00", "cached_input": "1.00", "output": "2.00"}
