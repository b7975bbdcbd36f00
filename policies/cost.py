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
    fresh, read, output = usage.input_tokens, usage.cache_read_tokens, usage.output_tokens
    written_5m, written_1h = usage.cache_write_5m_tokens, usage.cache_write_1h_tokens
    rates = card.rates(fresh + read + written_5m + written_1h, service_tier, at_time)
    if rates is None or (not (rates.has_input and rates.has_output) and not _covers(rates, usage)):
        return None
    # Both in millionths of a nano-dollar. Parts with a rate of their own differ from their whole by the difference.
    plain, read_rate, output_rate = rates.input, rates.cache_read, rates.output
    total = fresh * plain + read * read_rate + output * output_rate + rates.request
    saved = read * (plain - read_rate)
    if written_5m or written_1h:
        total += written_5m * rates.cache_write_5m + written_1h * rates.cache_write_1h
        saved += written_5m * (plain - rates.cache_write_5m) + written_1h * (plain - rates.cache_write_1h)
    if usage.reasoning_tokens:
        total += usage.reasoning_tokens * (rates.reasoning - output_rate)
    if usage.input_audio_tokens or usage.cache_read_audio_tokens or usage.output_audio_tokens:
        audio, read_audio = rates.input_audio - plain, rates.cache_read_audio - read_rate
        total += usage.input_audio_tokens * audio + usage.cache_read_audio_tokens * read_audio
        total += usage.output_audio_tokens * (rates.output_audio - output_rate)
        saved += usage.cache_read_audio_tokens * (audio - read_audio)
    return Charge(_rounded(total), _rounded(saved) if saved else 0)


def _covers(rates: Rates, usage: Usage) -> bool:
    return (rates.has_input or not usage.prompt_tokens) and (rates.has_output or not usage.output_tokens)


def _rounded(millionths: int) -> int:
    whole = millionths // _MILLION
    rest = millionths - whole * _MILLION
    return whole + (rest > _HALF or (rest == _HALF and whole & 1))
