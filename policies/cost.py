"""Usage times rates, in whole nano-dollars.

Integers all the way: tokens times nano-dollars per million tokens, divided once per request, half to even. The
size of the whole prompt, the service tier the upstream answered and the time of the request pick the rates.
"""

from typing import Final

import msgspec

from backends.usage import Usage
from policies.prices import Price
from policies.rate_card import Rates

_MILLION: Final = 1_000_000
_HALF: Final = _MILLION // 2


class Charge(msgspec.Struct, frozen=True):
    """What a request cost, and what a cache took off that.

    `saved_nanousd` is what the request would have cost without a cache, less what it cost: negative where writing
    to the cache was dearer than reading from it saved, so that over a session it is the true sum.
    """

    cost_nanousd: int
    saved_nanousd: int


_NOTHING: Final = Charge(0, 0)


def charge(usage: Usage, price: Price, service_tier: str, at_time: float) -> Charge | None:
    """None if the price, or that of a kind of token that was used, is unknown."""
    card = price.card
    if card is None:
        return _NOTHING if price.kind == "free" else None
    rates = card.rates(usage.prompt_tokens, service_tier, at_time)
    if rates is None or (not (rates.has_input and rates.has_output) and not _covers(rates, usage)):
        return None
    return Charge(_rounded(_product(usage, rates)), _rounded(_saved(usage, rates)))


def _saved(usage: Usage, rates: Rates) -> int:
    """In millionths of a nano-dollar."""
    plain = rates.input
    saved = usage.cache_read_tokens * (plain - rates.cache_read)
    if usage.cache_write_5m_tokens or usage.cache_write_1h_tokens:
        saved += usage.cache_write_5m_tokens * (plain - rates.cache_write_5m)
        saved += usage.cache_write_1h_tokens * (plain - rates.cache_write_1h)
    if usage.cache_read_audio_tokens:
        audio, read_audio = rates.input_audio - plain, rates.cache_read_audio - rates.cache_read
        saved += usage.cache_read_audio_tokens * (audio - read_audio)
    return saved


def _product(usage: Usage, rates: Rates) -> int:
    """In millionths of a nano-dollar. Parts with a rate of their own differ from their whole by the difference."""
    total = (
        usage.input_tokens * rates.input
        + usage.cache_read_tokens * rates.cache_read
        + usage.output_tokens * rates.output
        + rates.request
    )
    if usage.cache_write_5m_tokens or usage.cache_write_1h_tokens:
        total += usage.cache_write_5m_tokens * rates.cache_write_5m
        total += usage.cache_write_1h_tokens * rates.cache_write_1h
    if usage.reasoning_tokens:
        total += usage.reasoning_tokens * (rates.reasoning - rates.output)
    if usage.input_audio_tokens or usage.cache_read_audio_tokens or usage.output_audio_tokens:
        total += usage.input_audio_tokens * (rates.input_audio - rates.input)
        total += usage.cache_read_audio_tokens * (rates.cache_read_audio - rates.cache_read)
        total += usage.output_audio_tokens * (rates.output_audio - rates.output)
    return total


def _covers(rates: Rates, usage: Usage) -> bool:
    return (rates.has_input or not usage.prompt_tokens) and (rates.has_output or not usage.output_tokens)


def _rounded(millionths: int) -> int:
    whole, rest = divmod(millionths, _MILLION)
    return whole + (rest > _HALF or (rest == _HALF and whole & 1))
