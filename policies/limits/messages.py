"""What is said between a holder (a worker) and a store of limits, and what a store must make of it.

One message, `Update`, does everything, atomically: post what was spent, give back, take all-or-nothing, take what
can be had. The meaning is `policies.limits.counting`, which is also the store in memory; SQLite runs that very code
in a transaction, Redis does the same in Lua. One conformance suite holds them together.

A store keeps for each counter: what was *spent* (by slice or period; for a rate the GCRA arrival time) and what
each holder *holds*. `used = spent + held by live holders`. A holder that has not been heard of for its `ttl_us` has
lapsed: all it holds is free again. So nothing a dead worker had taken stays taken.
"""

from typing import Final, Literal

import msgspec

Kind = Literal["rate", "rolling", "period", "slots"]
WhenAway = Literal["local", "open", "closed"]  # fail_local, fail_open, fail_closed

FOREVER_US: Final = 2**52  # exact in a double; the year 2112
REMEMBERED_US: Final = 3_600_000_000


class Counter(msgspec.Struct, frozen=True):
    """A counter and its limit, as the holder sees them now. State lives under `key`, so the rest may change.

    `rate`: GCRA. Taking n moves the theoretical arrival time `tat = max(tat, now) + cost(n)`, where
    `cost(n) = ceil(n * window_us / amount)`, and is allowed if then `tat - now <= cost(burst)`; giving n back subtracts
    `cost(n)`. No holds are kept: what a dead holder had taken refills by itself.
    `rolling`: spent is kept by slices of `slice_us` (their start: `t - t % slice_us`); a slice counts while
    `start + slice_us + window_us > now`, so never more than `amount` in any window. Fits if `used + n <= amount`.
    `period`: spent is kept by the period's start; `periods` are the starts of the current period, the next and the
    one after as the holder knows them, and the store's own time says which of the two holds: `periods[0]` before
    `periods[1]`, else `periods[1]`. Only its spent counts. For ever is (0, FOREVER_US, FOREVER_US).
    `slots`: nothing is spent, only held.
    """

    key: str
    kind: Kind
    amount: int
    window_us: int = 0
    slice_us: int = 0
    burst: int = 0
    periods: tuple[int, int, int] = (0, 0, 0)
    when_away: WhenAway = "local"


class Update(msgspec.Struct, frozen=True):
    """All that a holder has to say at this moment. Numbers in the tuples: index into `counters`, then units.

    `number` counts a holder's updates from 1. The one just applied, repeated (its answer was lost), is answered in the
    same words and changes nothing. Any other number but the next one, or a number above 1 from a holder that is not
    known, changes nothing and is answered with `is_known` False: the holder must begin again under another name,
    and `claims` what it holds. Order of application: posts, releases, claims, groups, wants.
    """

    holder: str
    number: int
    ttl_us: int
    counters: tuple[Counter, ...] = ()
    # (counter, at_us, units): spent. `at_us` 0: now; else for `rolling` any moment of the slice, for `period` the
    # period's start. Units may be negative (a correction). May go beyond the amount: what was used was used.
    # For `rate` and `slots` there are none.
    posts: tuple[tuple[int, int, int], ...] = ()
    releases: tuple[tuple[int, int], ...] = ()  # what was held and is not needed; never below 0 held
    claims: tuple[tuple[int, int], ...] = ()  # held from now on, even beyond the amount; never refused
    groups: tuple[tuple[tuple[int, int], ...], ...] = ()  # each: held all, or none of it
    wants: tuple[tuple[int, int], ...] = ()  # held as far as it fits
    is_last: bool = False  # afterwards the holder has lapsed


class Refusal(msgspec.Struct, frozen=True):
    """Why a group was not granted: the first of its counters that had no room (index into `counters`).

    `fits_at_us` is when it would fit if nobody did anything but wait; 0: waiting alone does not help, or nobody knows.
    """

    counter: int
    fits_at_us: int
    spent: int  # as in Reading, at the moment of refusal
    held: int
    is_away: bool = False  # not the counter's amount: the store is away, and nobody may go on without it


class Reading(msgspec.Struct, frozen=True):
    """Where a counter stands. For a `rate`, spent is what has not refilled yet (rounded up), held 0."""

    spent: int
    held: int  # by all live holders, the asking one included
    resets_at_us: int  # when all that is spent has come back; 0: never, or nothing is ever spent


class Reply(msgspec.Struct, frozen=True):
    """The store's answer. Times are the store's, which never run backwards."""

    now_us: int
    is_known: bool = True
    was_applied: bool = False  # with `is_known` False: this very update had been applied, and its posts stand
    is_away: bool = False  # not the store's word, but what is done while it is away
    holders: int = 1  # live ones
    refusals: tuple[Refusal | None, ...] = ()  # for each group; None: granted
    granted: tuple[int, ...] = ()  # for each of `wants`
    readings: tuple[Reading, ...] = ()  # for each counter, after all of it
