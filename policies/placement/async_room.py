"""How much work that can wait may be sent to a pool now: the gate in front of the queue.

Work of the queue goes only where there is room to spare, so that a request somebody waits for never meets it in the
engine's own queue. Three things say how much that is: what is seen of the endpoints (`idle_slots`), what a provider says
is left of its rate (`RateRoom`), and a limit that is learned from refusals (`AsyncLimit`). Refuses to know jobs, and the
clock. Priority inside the engine is not enough: batch work that is already in a step slows it for everybody (measured by
others: llm-d's batch gateway, issue 491), so what is in flight is bounded.
"""

from collections.abc import Sequence
from math import ceil, inf
from typing import Final

import msgspec

from backends.load import EndpointLoad
from policies.placement.saturation import KV_FULL

# Figures that are older than they may be say nothing; without any an engine is taken at its learned limit alone.
_UNKNOWN: Final = 1_000_000
_LEAST: Final = 1.0
_HALVED_AT_MOST_EVERY_S: Final = 1.0
RAMP_S: Final = 2.0
_STEP: Final = 0.02  # of all that may run
_LONGEST_STEP_S: Final = 0.1


def idle_slots(endpoints: Sequence[EndpointLoad], now: float, reserve: float) -> int:
    """Requests that could be sent to these endpoints now without any of them having to wait there.

    Of every endpoint the share `reserve` of its slots stays free, one at least if it has more than one. One in whose engine requests queue, or
    whose KV memory is as full as it may be, has none to give; nor has one whose figures are stale, for what cannot be
    seen cannot be protected. Endpoints that cannot be looked into (a provider's) give any number: their limit is learned.
    """
    return sum(_idle(endpoint, now, reserve) for endpoint in endpoints)


def job_slots(endpoints: Sequence[EndpointLoad], reserve: float) -> int:
    """How many jobs this process may have there at most, however they are spread: its part of what is not kept free.

    Placement sends a job where its cache is, not where `idle_slots` saw the room; without a bound on all of them, those that
    one endpoint has too many would be started once more for another.
    """
    return sum(
        endpoint.part_of(_slots(endpoint, reserve)) if endpoint.max_in_flight else _UNKNOWN
        for endpoint in endpoints
    )


def _slots(endpoint: EndpointLoad, reserve: float) -> int:
    return max(1, endpoint.max_in_flight - _kept(endpoint, reserve))


def _kept(endpoint: EndpointLoad, reserve: float) -> int:
    """Slots that stay free for others."""
    return max(1, ceil(endpoint.max_in_flight * reserve)) if reserve else 0


def _has_queue(endpoint: EndpointLoad, reserve: float) -> bool:
    """Whether requests wait in the engine for longer than until its next step.

    Whoever has just come waits so long in every engine: as many as are kept free for them, while there are slots, are no
    queue. Taken for one, they closed the gate for a second, every third second (measured; decision 0032).
    """
    if not endpoint.max_in_flight or endpoint.running + endpoint.waiting > endpoint.max_in_flight:
        return endpoint.waiting > 0
    return endpoint.waiting > _kept(endpoint, reserve)


def _idle(endpoint: EndpointLoad, now: float, reserve: float) -> int:
    if endpoint.is_draining or endpoint.health <= 0.0:
        return 0
    is_seen = endpoint.scraped_at > 0.0
    if is_seen and (
        now >= endpoint.fresh_until
        or _has_queue(endpoint, reserve)
        or endpoint.kv_usage >= KV_FULL * (1.0 - reserve)
    ):
        return 0
    if not endpoint.max_in_flight:
        return _UNKNOWN
    slots = _slots(endpoint, reserve)
    # Each process takes its part, or they would all take the same; rounded up, the parts would eat what is kept free.
    ours = endpoint.part_of(slots) - endpoint.in_flight
    if is_seen:
        # The engine's figure is of a moment ago, and may be older than what we had then. What we have sent and got back
        # since we know ourselves.
        idle = slots - endpoint.running - endpoint.waiting
        part = endpoint.part_of(idle) if idle > 0 else idle
        ours = min(ours, part - (endpoint.in_flight - endpoint.in_flight_at_scrape))
    return max(0, ours)


def is_congested(endpoints: Sequence[EndpointLoad], now: float, reserve: float) -> bool:
    """Whether requests queue inside any of the engines: more is in flight than they can hold."""
    return any(now < endpoint.fresh_until and _has_queue(endpoint, reserve) for endpoint in endpoints)


class AsyncLimit:
    """How many jobs this process may have at a pool: additive increase, multiplicative decrease.

    Doubles from round to round until the first refusal, then grows by one from round to round. `ceiling` is what it never
    exceeds, and where it begins if the pool's slots are known: then it is they that bound what is started. Of several processes each learns its own; together they meet what the pool can bear, as TCP's flows do.
    """

    __slots__ = ("_closed_until", "_halved_at", "_threshold", "ceiling", "value")

    def __init__(self, ceiling: float, *, is_bounded: bool = False) -> None:
        self.ceiling = ceiling
        self.value = ceiling if is_bounded else _LEAST
        self._threshold = inf
        self._halved_at = -inf
        self._closed_until = -inf

    def room(self, in_flight: int, now: float) -> int:
        """How many more may be started."""
        if now < self._closed_until:
            return 0
        return max(0, int(min(self.value, self.ceiling)) - in_flight)

    def succeeded(self, in_flight: int) -> None:
        """A job ended well, `in_flight` of which it was one. What is not used up is not raised."""
        if in_flight + 1 >= int(self.value) and self.value < self.ceiling:
            self.value = min(
                self.ceiling, self.value + (1.0 if self.value < self._threshold else 1.0 / self.value)
            )

    def refused(self, now: float, retry_after_s: float | None) -> None:
        """429 or 503: half of it, once a second at most, and nothing before the time that was asked for."""
        if retry_after_s is not None:
            self._closed_until = max(self._closed_until, now + retry_after_s)
        if now - self._halved_at >= _HALVED_AT_MOST_EVERY_S:
            self._halved_at = now
            self.value = self._threshold = max(_LEAST, self.value / 2)

    def crowded(self, now: float) -> None:
        """Requests wait in the engine: a tenth less, and new ones only when they no longer do."""
        if now - self._halved_at >= _HALVED_AT_MOST_EVERY_S:
            self._halved_at = now
            self.value = max(_LEAST, self.value * 0.9)

    def closed_for_s(self, now: float) -> float:
        """Until when a refusal asked to be left alone."""
        return max(0.0, self._closed_until - now)


class Ramp:
    """How many may run while more and more do: `RAMP_S` from none to all, a few at once. What has ended is replaced at once.

    A hundred jobs that start in one moment keep each other's prompts waiting, and everybody else's; and those of one length
    end in one moment, too, with no slot freed in between for whoever comes.
    """

    __slots__ = ("_at", "_level")

    def __init__(self, now: float) -> None:
        self._level = 0.0
        self._at = now

    def room(self, running: int, most: float, now: float) -> int:
        """How many more may be started; `most` is how many may run in the end."""
        step = 1.0 + most * _STEP
        took_s = min(now - self._at, _LONGEST_STEP_S)  # whoever did not look for long begins where it stands
        grown = min(max(self._level, running), running + step) + most / RAMP_S * took_s
        self._level, self._at = min(max(grown, running + 1.0), most), now
        return max(0, int(self._level) - running)


class RateReading(msgspec.Struct, frozen=True):
    """What an answer said of one rate of the account: how much there is, what is left, when it is whole again."""

    limit: int
    remaining: int
    resets_in_s: float


class RateRoom:
    """Whether an account's rates have enough left for work that can wait: the share `reserve` of each is for others."""

    __slots__ = ("_closed_until",)

    def __init__(self) -> None:
        self._closed_until = -inf

    def read(self, readings: Sequence[RateReading], now: float, reserve: float) -> None:
        """From the headers of an answer. Rates come back evenly, so it is known when the share is there again."""
        for reading in readings:
            missing = reading.limit * reserve - reading.remaining
            used = reading.limit - reading.remaining
            if missing > 0 and used > 0:
                self._closed_until = max(self._closed_until, now + reading.resets_in_s * missing / used)

    def is_open(self, now: float) -> bool:
        return now >= self._closed_until


class Trickle:
    """One start in so many seconds over all processes, however busy a pool is: so that nothing starves."""

    __slots__ = ("_due_at", "_every_s")

    def __init__(self, every_s: float, now: float) -> None:
        self._every_s = every_s
        self._due_at = now + every_s

    def started(self, now: float) -> None:
        """Something was started there, as trickle or otherwise."""
        self._due_at = now + self._every_s

    def is_due(self, now: float) -> bool:
        return now >= self._due_at
