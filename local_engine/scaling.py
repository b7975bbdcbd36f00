"""How many replicas a pool should have: load, schedule and bounds in, a number out.

Pure and synchronous; time is an argument, monotonic for durations and wall clock for the schedule. Owns hysteresis: a
reason must hold for a while, and one step is taken at a time. Refuses to know where figures come from.
"""

from datetime import datetime, timedelta
from typing import NamedTuple

from local_engine.supervision_config import WEEKDAYS, ScaleConfig, ScheduleConfig


class PoolLoad(NamedTuple):
    """What a pool has to do now. `waiting`: for room here, and in the engines' own queues; `saturation` is the mean of
    those that are ready, 0 where nothing is known."""

    ready: int
    waiting: int
    in_flight: int
    saturation: float


class Decision(NamedTuple):
    """`replicas` is what there should be; `reason` is empty when that is what there is."""

    replicas: int
    reason: str = ""


class Scaler:
    """One pool's. `decide` is asked every few seconds."""

    def __init__(self, settings: ScaleConfig) -> None:
        self.settings = settings
        self._up_since_at: float | None = None
        self._down_since_at: float | None = None
        self._idle_since_at: float | None = None

    def bounds(self, now_time: datetime) -> tuple[int, int]:
        """The fewest and the most at this moment."""
        for entry in self.settings.schedule:
            if _covers(entry, now_time):
                low = self.settings.min if entry.min is None else entry.min
                return low, self.settings.max if entry.max is None else entry.max
        return self.settings.min, self.settings.max

    def decide(self, current: int, load: PoolLoad, now: float, now_time: datetime) -> Decision:
        """`current` is how many are wanted so far, ready or not."""
        settings = self.settings
        low, high = self.bounds(now_time)
        if current > high:
            return self._step(high, "schedule" if high < settings.max else "bounds")
        is_busy = load.waiting > 0 or load.in_flight > 0
        if is_busy or not load.ready:
            self._idle_since_at = None  # one that is still starting was wanted by somebody
        elif self._idle_since_at is None:
            self._idle_since_at = now
        least = max(low, 1) if is_busy or current > 0 else low
        if current < least:
            return self._step(least, "schedule" if low > settings.min else "bounds" if low else "waiting")
        if current < high and self._holds_up(current, load, now):
            return self._step(current + 1, "waiting" if self._is_queue_long(load) else "saturation")
        if current > least and self._holds_down(current, load, now):
            return self._step(current - 1, "idle")
        is_last = current == 1 and low == 0 and self._idle_since_at is not None
        if is_last and self._idle_since_at is not None and now - self._idle_since_at >= settings.zero_after_s:
            return self._step(0, "unused")
        return Decision(current)

    def _step(self, replicas: int, reason: str) -> Decision:
        self._up_since_at = self._down_since_at = self._idle_since_at = None
        return Decision(replicas, reason)

    def _is_queue_long(self, load: PoolLoad) -> bool:
        return load.waiting >= self.settings.waiting * max(load.ready, 1)

    def _holds_up(self, current: int, load: PoolLoad, now: float) -> bool:
        """One that is still starting is help under way."""
        has_reason = load.ready >= current and (
            self._is_queue_long(load) or load.saturation >= self.settings.saturation
        )
        if not has_reason:
            self._up_since_at = None
            return False
        if self._up_since_at is None:
            self._up_since_at = now
        return now - self._up_since_at >= self.settings.up_after_s

    def _holds_down(self, current: int, load: PoolLoad, now: float) -> bool:
        fuller = load.saturation * load.ready / max(current - 1, 1)
        has_reason = load.waiting == 0 and load.ready >= current and fuller <= self.settings.idle_saturation
        if not has_reason:
            self._down_since_at = None
            return False
        if self._down_since_at is None:
            self._down_since_at = now
        return now - self._down_since_at >= self.settings.down_after_s


def _covers(entry: ScheduleConfig, now_time: datetime) -> bool:
    first, last = entry.span()
    for days_ago in (0, 1):  # what began yesterday may not have ended
        day = now_time - timedelta(days=days_ago)
        minute = now_time.hour * 60 + now_time.minute + days_ago * 24 * 60
        if WEEKDAYS[day.weekday()] in entry.days and first <= minute < last:
            return True
    return False
