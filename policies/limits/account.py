"""A worker's memory of one counter: what it holds there, what of it is free, what was spent and not yet told.

Owns the arithmetic between `admit`, `settle` and the store's answers; asks nobody. Invariant:
`held = free + committed + unposted`, where committed is what requests under way have reserved (for a rate nothing:
what is taken is gone). So what is admitted out of `free` was taken from the limit before.
"""

from typing import Final

from policies.limits.limit import SLOT_MEASURES, Limit, Measure
from policies.limits.messages import Counter, Reading

# Index into the units a request asks of each measure.
MEASURES: Final[tuple[Measure, ...]] = (
    "requests",
    "tokens",
    "input_tokens",
    "output_tokens",
    "concurrent_requests",
    "concurrent_streams",
    "money",
)
_HORIZON_S: Final = 1.0  # slack is what was asked for in so much time
_MEMORY: Final = 0.7  # of the demand seen before, when new demand is seen
_IDLE_S: Final = 3.0  # after so long without any, no demand is expected
_SHARE_OF_ROOM: Final = 4  # near the limit a worker holds a quarter of its share of what is left


class Account:
    """One counter as this worker knows it. Units are the measure's."""

    __slots__ = (
        "_asked_at",
        "asked",
        "bound",
        "counter",
        "demand",
        "discount_percent",
        "free",
        "held",
        "is_near",
        "is_rate",
        "is_slots",
        "is_soft",
        "is_touched",
        "limit",
        "low",
        "member",
        "need",
        "reading",
        "slack",
        "unposted",
        "unposted_units",
        "used_at",
    )

    def __init__(self, limit: Limit, member: str, now_us: int) -> None:
        self.limit = limit
        self.member = member
        self.counter: Counter = limit.counter(member, now_us)
        self.need = MEASURES.index(limit.measure)
        self.is_rate = self.counter.kind == "rate"
        self.is_slots = limit.measure in SLOT_MEASURES
        self.is_soft = limit.warns_only
        self.discount_percent = _discount(limit)
        self.free = 0
        self.held = 0  # of no meaning for a rate
        self.unposted: dict[int, int] = {}  # by period's start, 0: now
        self.unposted_units = 0
        self.reading: Reading | None = None  # the store's last word
        self.slack = 0  # how much to keep free
        self.low = 0  # below this much free, more is asked for before it runs out
        self.is_near = True  # so little is left that others want to know at once of what comes back
        self.bound = 0.0  # what slack may never exceed
        self.demand = 0.0  # units a second
        self.asked = 0  # units since demand was last reckoned
        self._asked_at = 0.0
        self.used_at = 0.0
        self.is_touched = False  # the next update says something about it

    @property
    def committed(self) -> int:
        """What requests under way have reserved."""
        return 0 if self.is_rate else self.held - self.unposted_units - self.free

    @property
    def is_idle(self) -> bool:
        """Nothing here that the store does not know, and nothing held."""
        return not (self.free or self.committed or self.unposted_units)

    @property
    def remaining(self) -> int:
        """What could still be had, to this worker's knowledge."""
        reading, amount = self.reading, self.counter.burst or self.counter.amount
        if reading is None:
            return amount
        return max(0, min(amount, amount - reading.spent - reading.held + self.free))

    @property
    def is_over(self) -> bool:
        """More is used than the amount, to this worker's knowledge: only a limit that warns lets that happen."""
        reading = self.reading
        if reading is None or self.is_rate:
            return self.free < 0
        return reading.spent + reading.held > self.counter.amount

    def change(self, limit: Limit, now_us: int) -> None:
        """The limit was changed under the same name: what is counted stands."""
        self.limit = limit
        self.is_soft = limit.warns_only
        self.discount_percent = _discount(limit)
        self.counter = limit.counter(self.member, now_us)

    def settle(self, reserved: int, actual: int, received_us: int) -> None:
        """A request is over: of `reserved` units `actual` were used, more or less. `received_us`: its wall clock."""
        self.free += reserved - actual
        if actual and not (self.is_rate or self.is_slots):
            at_us = 0
            if self.counter.kind == "period":
                at_us = self._period_of(received_us)
            self.unposted[at_us] = self.unposted.get(at_us, 0) + actual
            self.unposted_units += actual

    def _period_of(self, received_us: int) -> int:
        start_us, end_us, _ = self.counter.periods
        if start_us <= received_us < end_us:
            return start_us
        return self.limit.counter(self.member, received_us).periods[0]

    def plan_slack(self, now_at: float, holders: int, over_admission: float) -> None:
        """How much to keep free from now on: as demand asks, within the bound, and little when little is left."""
        elapsed_s = now_at - self._asked_at
        if elapsed_s >= _HORIZON_S / 4:
            seen = self.asked / elapsed_s if self._asked_at else float(self.asked)
            self.demand = max(seen, self.demand * _MEMORY) if seen else self.demand * _MEMORY
            if seen:
                self.used_at = now_at
            elif now_at - self.used_at > _IDLE_S:
                self.demand = 0.0
            self.asked, self._asked_at = 0, now_at
        amount = self.counter.amount
        if self.limit.is_exact or self.limit.warns_only or not amount:
            self.slack = self.low = 0
            self.is_near = True
            return
        self.bound = over_admission * amount / max(1, holders)
        reading = self.reading
        room = amount if reading is None else amount - reading.spent - reading.held + self.free
        share = max(0, room) / (holders * _SHARE_OF_ROOM)
        self.is_near = share < self.bound
        self.slack = int(min(self.demand * _HORIZON_S, self.bound, share))
        self.low = self.slack // 2


def _discount(limit: Limit) -> int:
    """How much less a token counts that was read from a cache."""
    return 100 - limit.cached_weight_percent if limit.measure in ("tokens", "input_tokens") else 0
