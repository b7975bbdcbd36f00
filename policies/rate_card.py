"""What tokens cost, in whole numbers: a rate is nano-dollars per million tokens, so $0.0375 is 37_500_000.

A card holds every rate of a model: by service tier, by date and time of day, by size of the prompt. It is
compiled once, from ladders of decimal dollars; nothing here divides, rounds usage or reads a price list.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Final, NamedTuple

_NANO: Final = 1_000_000_000
_DAY_S: Final = 86_400
STANDARD: Final = ""


class Rates(NamedTuple):
    """Nano-dollars per million tokens. Where input or output has no price, its rates are 0 and mean nothing."""

    input: int
    cache_read: int
    cache_write_5m: int
    cache_write_1h: int
    output: int
    reasoning: int
    input_audio: int
    cache_read_audio: int
    output_audio: int
    request: int = 0  # per million requests, whatever their tokens
    has_input: bool = True
    has_output: bool = True


# A bucket's price as (above, dollars per million) steps: a prompt of more than `above` tokens pays that price for
# all of its tokens. -1 is the price of any prompt.
Step = tuple[int, Decimal]
Ladders = Mapping[str, Sequence[Step]]
ANY_PROMPT: Final = -1

# Rates by size of the prompt, largest first; the last step is for any prompt.
Steps = tuple[tuple[int, Rates], ...]
# By service tier as the upstream answers it; a tier that is not there costs what STANDARD does.
Cards = Mapping[str, Steps | None]


@dataclass(frozen=True, slots=True)
class Period:
    """Prices from one moment to the next: since `start_time` (wall clock), and since `start_s` of each UTC day."""

    start_time: float
    start_s: float
    cards: Cards


class RateCard:
    """All rates of one model at one upstream."""

    __slots__ = ("_days", "_only", "_seconds", "_table", "hash")

    def __init__(self, periods: Iterable[Period]) -> None:
        """`periods` cover every pair of their start times and starts of day, the earliest of which begin it all."""
        ordered = sorted(periods, key=lambda period: (period.start_time, period.start_s))
        self._days = sorted({period.start_time for period in ordered})
        self._seconds = sorted({period.start_s for period in ordered})
        self._table = [period.cards for period in ordered]
        self._only = self._table[0] if len(self._table) == 1 else None
        content = [(p.start_time, p.start_s, sorted(p.cards.items())) for p in ordered]
        self.hash = hashlib.blake2b(repr(content).encode(), digest_size=6).hexdigest()

    def rates(self, prompt_tokens: int, service_tier: str, at_time: float) -> Rates | None:
        """For a request of `prompt_tokens` in all, at a wall-clock time. None: no price then."""
        cards = self._only if self._only is not None else self._at(at_time)
        steps = cards[service_tier] if service_tier in cards else cards[STANDARD]
        if steps is None:
            return None
        for above, rates in steps:
            if prompt_tokens > above:
                return rates
        return None

    def scaled(self, factor: Decimal) -> "RateCard":
        """The same card with every rate times `factor`, half to even."""
        return RateCard(
            Period(
                self._days[place // len(self._seconds)],
                self._seconds[place % len(self._seconds)],
                {tier: _scaled(steps, factor) for tier, steps in cards.items()},
            )
            for place, cards in enumerate(self._table)
        )

    @property
    def flat(self) -> Rates | None:
        """The standard rates, where neither the size of the prompt nor the time changes them."""
        steps = None if self._only is None else self._only[STANDARD]
        return steps[0][1] if steps is not None and len(steps) == 1 else None

    @property
    def is_free(self) -> bool:
        """Every rate there is, is zero."""
        every = [steps for cards in self._table for steps in cards.values()]
        return all(steps is not None and not any(any(rates[:10]) for _, rates in steps) for steps in every)

    def _at(self, at_time: float) -> Cards:
        day = max(0, bisect_right(self._days, at_time) - 1)
        second = max(0, bisect_right(self._seconds, at_time % _DAY_S) - 1)
        return self._table[day * len(self._seconds) + second]


def compile_steps(ladders: Ladders) -> Steps | None:
    """Rates from ladders by bucket (names as in `Rates`, and `cache_write`). None if neither input nor output has one.

    A bucket without a price of its own costs what it is a kind of: cached and written tokens are input, an hour's
    write is a write, reasoning is output, audio is whatever text is in its place. Rates finer than a nano-dollar
    per million are rounded half to even.
    """
    if not ("input" in ladders or "output" in ladders):
        return None
    edges = sorted({above for ladder in ladders.values() for above, _ in ladder} | {ANY_PROMPT}, reverse=True)
    return tuple((edge, _rates_at(edge, ladders)) for edge in edges)


def nanousd(dollars: Decimal) -> int:
    """Dollars to nano-dollars, half to even."""
    return int((dollars * _NANO).quantize(Decimal(1), ROUND_HALF_EVEN))


def _scaled(steps: Steps | None, factor: Decimal) -> Steps | None:
    if steps is None:
        return None

    def scaled(rate: int) -> int:
        return int((rate * factor).quantize(Decimal(1), ROUND_HALF_EVEN))

    return tuple(
        (above, Rates._make((*map(scaled, rates[:10]), rates.has_input, rates.has_output)))
        for above, rates in steps
    )


def _rates_at(edge: int, ladders: Ladders) -> Rates:
    own: dict[str, int] = {}
    for bucket, ladder in ladders.items():
        reached = [step for step in ladder if step[0] <= edge]
        if reached:
            own[bucket] = nanousd(max(reached)[1])
    fresh = own.get("input", 0)
    output = own.get("output", 0)
    cache_read = own.get("cache_read", fresh)
    write = own.get("cache_write", fresh)
    input_audio = own.get("input_audio", fresh)
    # Cached audio without any price for cached tokens is audio, with one it is cached.
    cached_audio = cache_read if "cache_read" in own or "input_audio" not in own else input_audio
    return Rates(
        input=fresh,
        cache_read=cache_read,
        cache_write_5m=own.get("cache_write_5m", write),
        cache_write_1h=own.get("cache_write_1h", write),
        output=output,
        reasoning=own.get("reasoning", output),
        input_audio=input_audio,
        cache_read_audio=own.get("cache_read_audio", cached_audio),
        output_audio=own.get("output_audio", output),
        request=own.get("request", 0),
        has_input="input" in own,
        has_output="output" in own,
    )
