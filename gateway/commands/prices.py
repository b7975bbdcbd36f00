"""A price as people and programs read it: dollars per million tokens, for a short prompt at this moment."""

from collections.abc import Mapping
from decimal import Decimal

from policies.prices import Price
from policies.rate_card import STANDARD

_WORDS = {"input": "in", "cached_input": "cached", "output": "out"}


def usd_per_million_tokens(price: Price, now_time: float) -> dict[str, str] | None:
    """Exact decimals by kind of token, kinds without a price left out; None where nothing is known."""
    rates = None if price.card is None else price.card.rates(1, STANDARD, now_time)
    if rates is None:
        return None
    known = {"input": rates.input, "cached_input": rates.cache_read} if rates.has_input else {}
    if rates.has_output:
        known["output"] = rates.output
    return {kind: _decimal(rate) for kind, rate in known.items()}


def price_text(kind: str, usd: Mapping[str, str] | None) -> str:
    """`$0.10 in, $0.01 cached, $0.40 out`, or the kind of price it is where there are no figures."""
    if not usd:
        return kind
    return ", ".join(f"${figure} {_WORDS[name]}" for name, figure in usd.items())


def _decimal(nanousd: int) -> str:
    """At least two places, as prices are written."""
    exact = Decimal(nanousd).scaleb(-9).normalize()
    return f"{exact:f}" if int(exact.as_tuple().exponent) < -1 else f"{exact:.2f}"
