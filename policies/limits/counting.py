"""What an update does to counters: the meaning of `policies.limits.messages`, over states in memory.

Pure and whole: the SQLite store runs it between reading and writing the states, the Redis store is held to it by
the conformance suite, and it is a store by itself for simulations and for when the real one is away.
"""

import math
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

import msgspec

from policies.limits.messages import REMEMBERED_US, Counter, Reading, Refusal, Reply, Update


class State(msgspec.Struct):
    """One counter: units spent by slice or period start, units held by holder, a rate's arrival time."""

    spent: dict[int, int] = msgspec.field(default_factory=dict)
    held: dict[str, int] = msgspec.field(default_factory=dict)
    tat_us: int = 0


class Holder(msgspec.Struct):
    """Who holds: its latest update and what was answered, until when it is believed alive, where it holds."""

    number: int
    expires_us: int
    reply: Reply | None  # None: it has lapsed
    keys: set[str] = msgspec.field(default_factory=set)


class _Use(NamedTuple):
    spent: int
    held: int


def apply(
    update: Update, states: MutableMapping[str, State], holders: MutableMapping[str, Holder], now_us: int
) -> Reply:
    """Applies the update to the states, which holds those of all its counters (missing ones are made)."""
    lapse(states, holders, now_us)
    known = holders.get(update.holder)
    if known is not None and known.reply is None:
        return _unknown(now_us, holders, was_applied=known.number == update.number)
    if known is not None and known.reply is not None and known.number == update.number:
        known.expires_us = now_us + update.ttl_us
        return known.reply
    if update.number != (1 if known is None else known.number + 1):
        return _unknown(now_us, holders, was_applied=False)
    holder = known or Holder(0, 0, None)
    holder.number, holder.expires_us = update.number, now_us + update.ttl_us
    holder.reply = Reply(now_us)  # alive, so that it is counted among the holders
    holders[update.holder] = holder
    book = _Book(update, states, now_us)
    book.record()
    refusals = tuple(map(book.refuse, update.groups))
    granted = tuple(book.grant(counter, units) for counter, units in update.wants)
    for counter in update.counters:
        if update.holder in states[counter.key].held:
            holder.keys.add(counter.key)
        else:
            holder.keys.discard(counter.key)
    if update.is_last:
        _lapse(update.holder, holder, states)
        holder.reply = None
    reply = Reply(
        now_us,
        holders=_alive(holders),
        refusals=refusals,
        granted=granted,
        readings=tuple(reading(c, states[c.key], now_us) for c in update.counters),
    )
    if not update.is_last:
        holder.reply = reply
    return reply


def lapse(states: MutableMapping[str, State], holders: MutableMapping[str, Holder], now_us: int) -> None:
    """What holders held that were not heard of in time is free again; long after, they are forgotten."""
    for name, holder in list(holders.items()):
        if holder.expires_us > now_us:
            continue
        if holder.reply is not None:
            _lapse(name, holder, states)
            holder.reply = None
        if holder.expires_us + REMEMBERED_US <= now_us:
            del holders[name]


def _lapse(name: str, holder: Holder, states: MutableMapping[str, State]) -> None:
    for key in holder.keys:
        state = states.get(key)
        if state is not None:
            state.held.pop(name, None)
    holder.keys.clear()


def _unknown(now_us: int, holders: MutableMapping[str, Holder], *, was_applied: bool) -> Reply:
    return Reply(now_us, is_known=False, was_applied=was_applied, holders=_alive(holders))


def _alive(holders: MutableMapping[str, Holder]) -> int:
    return sum(holder.reply is not None for holder in holders.values())


def reading(counter: Counter, state: State, now_us: int) -> Reading:
    """Where the counter stands. `state` is not changed."""
    if counter.kind == "rate":
        behind_us = max(0, state.tat_us - now_us)
        spent = -(-behind_us * counter.amount // counter.window_us)
        return Reading(spent, 0, state.tat_us if behind_us else 0)
    spent, held = _use(counter, state, now_us)
    resets_at_us = 0
    if spent and counter.kind == "rolling":
        resets_at_us = max(state.spent) + counter.slice_us + counter.window_us
    elif spent and counter.periods[0]:
        resets_at_us = _period_end(counter, now_us)
    return Reading(spent, held, resets_at_us)


def _use(counter: Counter, state: State, now_us: int) -> _Use:
    held = sum(state.held.values())
    if counter.kind == "period":
        return _Use(state.spent.get(_period(counter, now_us), 0), held)
    if counter.kind == "rolling":
        since_us = now_us - counter.window_us - counter.slice_us
        return _Use(sum(units for start, units in state.spent.items() if start > since_us), held)
    return _Use(0, held)


def _period(counter: Counter, now_us: int) -> int:
    return counter.periods[1] if now_us >= counter.periods[1] else counter.periods[0]


def _period_end(counter: Counter, now_us: int) -> int:
    return counter.periods[2] if now_us >= counter.periods[1] else counter.periods[1]


def cost_us(counter: Counter, units: int) -> int:
    """How far a rate's arrival time moves for so many units."""
    return math.ceil(units * counter.window_us / counter.amount)


class _Book:
    """One update at work on its states."""

    def __init__(self, update: Update, states: MutableMapping[str, State], now_us: int) -> None:
        self._update = update
        self._counters = update.counters
        self._states = [states.setdefault(counter.key, State()) for counter in update.counters]
        self._now_us = now_us
        for counter, state in zip(self._counters, self._states, strict=True):
            self._prune(counter, state)

    def record(self) -> None:
        """Posts, releases, claims: what is never refused."""
        for index, at_us, units in self._update.posts:
            self._post(self._counters[index], self._states[index], at_us, units)
        for index, units in self._update.releases:
            self._hold(index, -units)
        for index, units in self._update.claims:
            self._hold(index, units)

    def refuse(self, group: Sequence[tuple[int, int]]) -> Refusal | None:
        """Takes all of the group, or says what had no room."""
        taken: list[tuple[int, int]] = []
        for index, units in group:
            refusal = self._missing(index, units)
            if refusal is not None:
                for earlier, earlier_units in taken:
                    self._hold(earlier, -earlier_units)
                return refusal
            self._hold(index, units)
            taken.append((index, units))
        return None

    def grant(self, index: int, units: int) -> int:
        """Takes as much as fits."""
        granted = max(0, min(units, self._room(index)))
        self._hold(index, granted)
        return granted

    def _room(self, index: int) -> int:
        counter, state = self._counters[index], self._states[index]
        if counter.amount <= 0:
            return 0
        if counter.kind == "rate":
            free_us = cost_us(counter, counter.burst) - max(0, state.tat_us - self._now_us)
            return free_us * counter.amount // counter.window_us
        spent, held = _use(counter, state, self._now_us)
        return counter.amount - spent - held

    def _hold(self, index: int, units: int) -> None:
        counter, state = self._counters[index], self._states[index]
        if counter.kind == "rate":
            if units > 0 and counter.amount > 0:
                state.tat_us = max(state.tat_us, self._now_us) + cost_us(counter, units)
            elif units < 0 and counter.amount > 0:
                state.tat_us -= cost_us(counter, -units)
            return
        holder = self._update.holder
        held = max(0, state.held.get(holder, 0) + units)
        if held:
            state.held[holder] = held
        else:
            state.held.pop(holder, None)

    def _post(self, counter: Counter, state: State, at_us: int, units: int) -> None:
        if counter.kind == "rolling":
            at_us = at_us or self._now_us
            start = at_us - at_us % counter.slice_us
        elif counter.kind == "period":
            start = at_us or _period(counter, self._now_us)
        else:
            return
        state.spent[start] = state.spent.get(start, 0) + units

    def _missing(self, index: int, units: int) -> Refusal | None:
        if units <= 0 or units <= self._room(index):
            return None
        counter, state = self._counters[index], self._states[index]
        stands = reading(counter, state, self._now_us)
        return Refusal(index, self._fits_at_us(counter, state, units), stands.spent, stands.held)

    def _fits_at_us(self, counter: Counter, state: State, units: int) -> int:
        if counter.kind == "rate":
            if counter.amount <= 0 or units > counter.burst:
                return 0
            tat_us = max(state.tat_us, self._now_us) + cost_us(counter, units)
            return tat_us - cost_us(counter, counter.burst)
        if units > counter.amount:
            return 0
        if counter.kind == "period":
            return _period_end(counter, self._now_us) if counter.periods[0] else 0
        if counter.kind == "rolling":
            spent, held = _use(counter, state, self._now_us)
            for start in sorted(state.spent):
                spent -= state.spent[start]
                if spent + held + units <= counter.amount:
                    return start + counter.slice_us + counter.window_us
        return 0

    def _prune(self, counter: Counter, state: State) -> None:
        if counter.kind == "rolling":
            since_us = self._now_us - counter.window_us - counter.slice_us
            for start in [start for start in state.spent if start <= since_us]:
                del state.spent[start]
        elif counter.kind == "period" and len(state.spent) > _KEPT_PERIODS:
            for start in sorted(state.spent)[:-_KEPT_PERIODS]:
                del state.spent[start]


_KEPT_PERIODS = 3
