"""What is answered in a store's place while it is away, and what the store is told of it afterwards.

Owns the last known state of the counters, this holder's fair share of them, and the posts nobody has taken yet. Pure:
when the store is away is not known here. Each counter says what to do (`when_away`):

`local`: the amount is divided by the holders there were, and so is what was spent; this holder counts its share by
itself. Together that is the limit again, plus one unit a holder where the share is less than one.
`closed`: nothing more is granted; what the holder has already taken, it has.
`open`: everything is granted, and counted.
"""

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from policies.limits.counting import Holder, State, apply, cost_us
from policies.limits.messages import FOREVER_US, Counter, Reading, Refusal, Reply, Update

_HERE: Final = "here"
_REMEMBERED: Final = 20_000  # counters
_UNKNOWN: Final = Reading(0, 0, 0)


class Substitute:
    """`observe` follows the store while it is there; `begin`, `answer`, `end` are for an absence."""

    def __init__(self) -> None:
        self._readings: dict[str, Reading] = {}
        self._held: dict[str, int] = {}  # by this holder
        self._holder = ""
        self._holders = 1
        self._states: dict[str, State] = {}
        self._local: dict[str, Holder] = {}
        self._number = 0
        self._doubtful: dict[tuple[str, int], int] = {}  # posts of an update that may have been applied
        self._unposted: dict[tuple[str, int], int] = {}
        self._counters: dict[str, Counter] = {}  # of what is unposted

    def observe(self, update: Update, reply: Reply) -> None:
        """What the store has just said and done."""
        if update.holder != self._holder:
            self._holder = update.holder
            self._held.clear()
        self._holders = max(1, reply.holders)
        self._doubtful.clear()
        self._unposted.clear()
        self._counters.clear()
        counters = update.counters
        for counter, reading in zip(counters, reply.readings, strict=True):
            self._readings.pop(counter.key, None)
            self._readings[counter.key] = reading
        if len(self._readings) > _REMEMBERED:
            for key in list(self._readings)[: _REMEMBERED // 2]:
                del self._readings[key]
                self._held.pop(key, None)
        for index, units in _taken(update, reply):
            key = counters[index].key
            held = max(0, self._held.get(key, 0) + units)
            if held:
                self._held[key] = held
            else:
                self._held.pop(key, None)

    def with_unposted(self, update: Update) -> Update:
        """The update, and with it what was posted while nobody was there to take it."""
        if not self._unposted:
            return update
        counters = list(update.counters)
        index_of = {counter.key: index for index, counter in enumerate(counters)}
        posts = list(update.posts)
        for (key, at_us), units in self._unposted.items():
            if key not in index_of:
                index_of[key] = len(counters)
                counters.append(self._counters[key])
            posts.append((index_of[key], at_us, units))
        return replace(update, counters=tuple(counters), posts=tuple(posts))

    def begin(self, doubt: Update, now_us: int) -> None:
        """The store is away. Whether it has applied `doubt` will be known when it is back."""
        self._doubtful = _sums(doubt, now_us)
        self._counters |= {counter.key: counter for counter in doubt.counters}
        self._unposted = {}
        self._states, self._local, self._number = {}, {}, 0

    def end(self, *, is_posted: bool) -> None:
        """It is back, and has applied what was in doubt, or not."""
        if not is_posted:
            _add(self._unposted, self._doubtful.items())
        self._doubtful = {}
        self._states, self._local = {}, {}

    def answer(self, update: Update, now_us: int) -> Reply:
        """What is done meanwhile. The posts are kept for the store."""
        if update.posts:
            self._keep(update, now_us)
        counters = tuple(self._share(counter) for counter in update.counters)
        for counter, share in zip(update.counters, counters, strict=True):
            if counter.key not in self._states:
                self._states[counter.key] = self._seed(counter, share, now_us)
        self._number += 1
        here = Update(
            _HERE,
            self._number,
            FOREVER_US,
            counters,
            update.posts,
            update.releases,
            update.claims,
            update.groups,
        )
        reply = apply(here, self._states, self._local, now_us)
        return Reply(
            now_us,
            is_away=True,
            holders=self._holders,
            refusals=tuple(self._explained(update, refusal) for refusal in reply.refusals),
            granted=(0,) * len(update.wants),
            readings=tuple(map(self.reading, update.counters)),
        )

    def reading(self, counter: Counter) -> Reading:
        """The store's last word."""
        return self._readings.get(counter.key, _UNKNOWN)

    def _keep(self, update: Update, now_us: int) -> None:
        _add(self._unposted, _sums(update, now_us).items())
        for index, _, _ in update.posts:
            self._counters[update.counters[index].key] = update.counters[index]

    def _share(self, counter: Counter) -> Counter:
        if counter.when_away == "open":
            return replace(counter, amount=FOREVER_US, burst=FOREVER_US if counter.burst else 0)
        if counter.when_away == "closed" or not counter.amount:
            return replace(counter, amount=0)
        if counter.kind == "rate":
            window_us = counter.window_us * self._holders
            return replace(counter, window_us=window_us, burst=max(1, counter.burst // self._holders))
        return replace(counter, amount=max(1, counter.amount // self._holders))

    def _seed(self, counter: Counter, share: Counter, now_us: int) -> State:
        """This holder's part of what the store knew last."""
        state = State()
        held = self._held.get(counter.key, 0)
        if held and counter.kind != "rate":
            state.held[_HERE] = held
        spent = -(-self.reading(counter).spent // self._holders)
        if not spent:
            return state
        if counter.kind == "rate":
            state.tat_us = now_us + cost_us(share, spent) if share.amount else 0
        elif counter.kind == "rolling":
            state.spent[now_us - now_us % counter.slice_us] = spent
        elif counter.kind == "period":
            state.spent[counter.periods[1] if now_us >= counter.periods[1] else counter.periods[0]] = spent
        return state

    def _explained(self, update: Update, refusal: Refusal | None) -> Refusal | None:
        if refusal is None or update.counters[refusal.counter].when_away != "closed":
            return refusal
        reading = self.reading(update.counters[refusal.counter])
        return Refusal(refusal.counter, 0, reading.spent, reading.held, is_away=True)


def _taken(update: Update, reply: Reply) -> Iterable[tuple[int, int]]:
    """What the holder has of each counter, more or less than before."""
    yield from ((index, -units) for index, units in update.releases)
    yield from update.claims
    for group, refusal in zip(update.groups, reply.refusals, strict=True):
        if refusal is None:
            yield from group
    for (index, _), units in zip(update.wants, reply.granted, strict=True):
        yield index, units


def _sums(update: Update, now_us: int) -> dict[tuple[str, int], int]:
    """The update's posts by counter and time; for a rolling window "now" is the moment it was said."""
    sums: dict[tuple[str, int], int] = {}
    for index, at_us, units in update.posts:
        counter = update.counters[index]
        if counter.kind == "rolling":
            at_us = at_us or now_us
            at_us -= at_us % counter.slice_us
        elif counter.kind == "period" and counter.periods[0]:
            at_us = at_us or (counter.periods[1] if now_us >= counter.periods[1] else counter.periods[0])
        _add(sums, (((counter.key, at_us), units),))
    return sums


def _add(sums: dict[tuple[str, int], int], more: Iterable[tuple[tuple[str, int], int]]) -> None:
    for key, units in more:
        sums[key] = sums.get(key, 0) + units
