"""Who is next when a full pool has room again: the discipline of one waiting room.

The highest class first, a request rising by one for each `ageing_s` it has waited; within a class the tenants take
turns, each in its own order of arrival, so that a thousand requests of one do not stand before the one of another.
Synchronous, time is passed in; what a place in the room stands for is the caller's.
"""

from typing import Final

from policies.placement.priority import PriorityConfig

_LEAST_SERVICE_S: Final = 0.05
_LEARNING_RATE: Final = 0.1


class Waiter:
    """One request. `item` is whatever the caller wants back."""

    __slots__ = ("deadline_at", "entered_at", "item", "priority", "tenant")

    def __init__(
        self, tenant: str, priority: int, entered_at: float, deadline_at: float, item: object
    ) -> None:
        self.tenant = tenant
        self.priority = priority  # place in PRIORITIES; 0 is the highest
        self.entered_at = entered_at
        self.deadline_at = deadline_at
        self.item = item


class Room:
    """The waiting room of one pool."""

    __slots__ = ("_classes", "_last_served", "_lines", "_served", "_sizes")

    def __init__(self, classes: tuple[PriorityConfig, ...]) -> None:
        self._classes = classes
        # By class, then by tenant in the order in which the tenants are served.
        self._lines: list[dict[str, dict[Waiter, None]]] = [{} for _ in classes]
        self._sizes = [0] * len(classes)
        self._served = 0
        self._last_served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._sizes)

    def sizes(self) -> list[int]:
        """By class."""
        return list(self._sizes)

    def enter(self, tenant: str, priority: int, now: float, item: object) -> Waiter | None:
        """None: the class has as many waiting as it may."""
        settings = self._classes[priority]
        if self._sizes[priority] >= settings.waiting or settings.wait_s <= 0:
            return None
        waiter = Waiter(tenant, priority, now, now + settings.wait_s, item)
        self._sizes[priority] += 1
        self._lines[priority].setdefault(tenant, {})[waiter] = None
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """Served, out of time or gone: it no longer waits. Leaving twice does nothing."""
        line = self._lines[waiter.priority].get(waiter.tenant)
        if line is None or waiter not in line:
            return
        del line[waiter]
        self._sizes[waiter.priority] -= 1
        if not line:
            del self._lines[waiter.priority][waiter.tenant]

    def order(self, now: float) -> list[Waiter]:
        """The next of each tenant and class, in the order in which they are to be tried."""
        heads = [next(iter(line)) for lines in self._lines for line in lines.values()]
        return sorted(heads, key=lambda waiter: self._rank(waiter, now))

    def serve(self, waiter: Waiter) -> None:
        """It gets what it waited for; its tenant's next turn is after the others'."""
        self.leave(waiter)
        self._served += 1
        self._last_served[waiter.tenant] = self._served
        if len(self._last_served) > 4 * len(self._classes) + 2 * sum(map(len, self._lines)):
            waiting = {tenant for lines in self._lines for tenant in lines}
            self._last_served = {t: turn for t, turn in self._last_served.items() if t in waiting}

    def overdue(self, now: float) -> list[Waiter]:
        """Those that have waited as long as they may."""
        return [
            waiter
            for lines in self._lines
            for line in lines.values()
            for waiter in line
            if waiter.deadline_at <= now
        ]

    def ahead(self, priority: int) -> int:
        """How many a new one of this class would wait behind."""
        return sum(self._sizes[: priority + 1])

    def _rank(self, waiter: Waiter, now: float) -> tuple[int, int, float]:
        risen = int((now - waiter.entered_at) / self._classes[waiter.priority].ageing_s)
        return (
            max(waiter.priority - risen, 0),
            self._last_served.get(waiter.tenant, 0),
            waiter.entered_at,
        )


class Throughput:
    """How long requests stay at a pool's endpoints, so that it can be told when one will have left."""

    __slots__ = ("service_s",)

    def __init__(self) -> None:
        self.service_s = 0.0  # 0: none has ended yet

    def ended(self, after_s: float) -> None:
        self.service_s += (_LEARNING_RATE if self.service_s else 1.0) * (after_s - self.service_s)

    def wait_s(self, ahead: int, in_flight: int) -> float:
        """Until it is the turn of one with so many before it; `in_flight` is what is being served now."""
        if not self.service_s:
            return 1.0
        return max((ahead + 1) * max(self.service_s, _LEAST_SERVICE_S) / max(in_flight, 1), _LEAST_SERVICE_S)
