"""What a model costs at an upstream: known, free because somebody said so, or unknown. Unknown is never $0.

The operator's price comes before the public list. Every price names its source and the hash of its card, so that
a ledger row can be priced again.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Final, Literal

from policies import price_catalogue
from policies.price_config import PriceConfig
from policies.rate_card import RateCard

__all__ = ["FREE", "UNKNOWN", "Price", "PriceBook", "PriceConfig"]

_LONGEST_NAME: Final = 256


@dataclass(frozen=True, slots=True)
class Price:
    """`card` and `card_hash` are there when the price is known; `gaps` names what the source prices and we do not."""

    kind: Literal["known", "free", "unknown"]
    source: str
    card: RateCard | None = None
    card_hash: str = ""
    gaps: tuple[str, ...] = ()

    def scaled(self, factor: Decimal) -> "Price":
        """The price times `factor`, which its source tells; what is free or unknown stays so."""
        if self.card is None or factor == 1:
            return self
        card = self.card.scaled(factor)
        return Price(self.kind, f"{self.source} x {factor}", card, card.hash, self.gaps)


FREE: Final = Price("free", "config")
UNKNOWN: Final = Price("unknown", "")


class PriceBook:
    """Looks prices up. Compiled once per model; the public list is loaded by the first question to it."""

    def __init__(self) -> None:
        self._written: dict[PriceConfig, Price] = {}

    def price(self, prices_id: str | None, upstream_model: str, override: PriceConfig | None = None) -> Price:
        """`prices_id` is the provider's id in genai-prices; None: it has no public prices."""
        if override is not None:
            price = self._written.get(override)
            if price is None:
                price = self._written[override] = _written(override)
            return price
        if prices_id is None or len(upstream_model) > _LONGEST_NAME:
            return UNKNOWN
        listing = price_catalogue.find(prices_id, upstream_model)
        if listing is None:
            return UNKNOWN
        if listing.card.is_free:
            return Price("free", price_catalogue.SOURCE)
        return Price("known", price_catalogue.SOURCE, listing.card, listing.card.hash, listing.gaps)


def _written(override: PriceConfig) -> Price:
    if override.free:
        return FREE
    card = override.card()
    return FREE if card.is_free else Price("known", "config", card, card.hash)
