"""The public price list (the genai-prices package, offline) compiled into rate cards.

A model's prices may differ by date, by time of day and by service tier; every combination is resolved once, by
asking the package itself, so that its rules stay its own. Units other than tokens and requests do not fit a card
and are named as gaps. Loading the list takes some 15 ms, at the first look-up.
"""

from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import lru_cache
from importlib.metadata import version
from typing import Final, NamedTuple

from genai_prices.data_snapshot import find_provider_by_id, get_snapshot
from genai_prices.types import (
    ConditionalPrice,
    ModelInfo,
    ModelPrice,
    PriceVariant,
    StartDateConstraint,
    TieredPrices,
    TimeOfDateConstraint,
)

from policies.rate_card import (
    ANY_PROMPT,
    STANDARD,
    Cards,
    Period,
    RateCard,
    Step,
    Steps,
    compile_steps,
)

SOURCE: Final = f"genai-prices {version('genai-prices')}"

_BUCKETS: Final = {
    "input_mtok": "input",
    "cache_read_mtok": "cache_read",
    "cache_write_mtok": "cache_write",
    "cache_write_5m_mtok": "cache_write_5m",
    "cache_write_1h_mtok": "cache_write_1h",
    "output_mtok": "output",
    "output_reasoning_mtok": "reasoning",
    "input_audio_mtok": "input_audio",
    "cache_audio_read_mtok": "cache_read_audio",
    "output_audio_mtok": "output_audio",
    "requests_kcount": "request",
}
# The list prices a thousand requests, a card a million.
_SCALE: Final = {"requests_kcount": 1_000}

# What the package wants to be told, by the tier that upstreams answer.
_CONTEXTS: Final[Mapping[str, dict[str, str]]] = {
    STANDARD: {},
    "batch": {"processing": "batch"},
    "flex": {"service_tier": "flex"},
    "priority": {"service_tier": "priority"},
    "fast": {"service_tier": "fast", "speed": "fast"},
}
# Before every dated price.
_LONG_AGO: Final = date(2000, 1, 1)


class Listing(NamedTuple):
    """A model's card, and the price keys it leaves out."""

    card: RateCard
    gaps: tuple[str, ...]


@lru_cache(maxsize=4096)
def find(provider: str, model: str) -> Listing | None:
    """The listing of a model under genai-prices' provider id, or None if there is none or it says no price."""
    snapshot = get_snapshot()
    seller = find_provider_by_id(snapshot.providers, provider)
    # Not the snapshot's own look-up: it remembers every name for ever, and names come from clients.
    info = seller.find_model(model, all_providers=snapshot.providers) if seller is not None else None
    if seller is None or info is None:
        return None
    # Service tiers are the maker's; another seller of the same model has its own (genai-prices, calc_price).
    has_tiers = any(info is own for own in seller.models)
    gaps: set[str] = set()
    periods = [
        Period(start_time, start_s, _cards(info, moment, gaps, has_tiers=has_tiers))
        for start_time, start_s, moment in _moments(info)
    ]
    if all(steps is None for period in periods for steps in period.cards.values()):
        return None
    return Listing(RateCard(periods), tuple(sorted(gaps)))


def names(provider: str) -> list[str]:
    """The models that the list has of this provider, without those it calls deprecated or only patterns."""
    snapshot = get_snapshot()
    seller = find_provider_by_id(snapshot.providers, provider)
    if seller is None:
        return []
    return [info.id for info in seller.models if not info.deprecated and not info.id.endswith("-")]


def _cards(info: ModelInfo, moment: datetime, gaps: set[str], *, has_tiers: bool) -> Cards:
    standard = _steps(info, info.get_prices(moment), gaps)
    cards: dict[str, Steps | None] = {STANDARD: standard}
    if has_tiers and info.price_variants:
        for tier, context in _CONTEXTS.items():
            steps = _steps(info, info.get_prices(moment, context), gaps)
            if steps != standard:
                cards[tier] = steps
    return cards


def _steps(info: ModelInfo, price: ModelPrice, gaps: set[str]) -> Steps | None:
    ladders: dict[str, list[Step]] = {}
    for key, value in vars(price).items():
        if value is None:
            continue
        bucket = _BUCKETS.get(key)
        if bucket is None:
            gaps.add(key)
            continue
        scale = _SCALE.get(key, 1)
        ladders[bucket] = [(above, dollars * scale) for above, dollars in _ladder(value)]
    if not ladders and info.id.endswith(":free"):
        # The list has no zeros: a free variant has no prices at all, like a model whose prices are not known.
        ladders = {"input": [(ANY_PROMPT, Decimal(0))], "output": [(ANY_PROMPT, Decimal(0))]}
    return compile_steps(ladders)


def _ladder(value: Decimal | TieredPrices) -> Iterator[Step]:
    if isinstance(value, TieredPrices):
        yield ANY_PROMPT, value.base
        for tier in value.tiers:
            yield tier.start, tier.price
    else:
        yield ANY_PROMPT, value


def _moments(info: ModelInfo) -> Iterator[tuple[float, float, datetime]]:
    """One moment in each stretch in which no price changes: (start of its days, start in the day, itself)."""
    conditions: list[ConditionalPrice | PriceVariant] = [*(info.price_variants or ())]
    if not isinstance(info.prices, ModelPrice):
        conditions += info.prices
    constraints = [condition.constraint for condition in conditions]
    days = {_LONG_AGO} | {c.start_date for c in constraints if isinstance(c, StartDateConstraint)}
    times = {0.0} | {
        _second(edge)
        for c in constraints
        if isinstance(c, TimeOfDateConstraint)
        for edge in (c.start_time, c.end_time)
    }
    for day in sorted(days):
        midnight = datetime.combine(day, time(), UTC)
        for second in sorted(times):
            yield midnight.timestamp(), second, midnight + timedelta(seconds=second)


def _second(edge: time) -> float:
    """Of the UTC day; a time without a zone is UTC."""
    offset = edge.utcoffset() or timedelta()
    since = timedelta(
        hours=edge.hour, minutes=edge.minute, seconds=edge.second, microseconds=edge.microsecond
    )
    return (since - offset).total_seconds() % 86_400
