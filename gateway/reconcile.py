"""Spend counters against the ledger they derive from: compared to the nano-dollar, and brought back to it.

The ledger is the truth: what a counter of a period (a day, week, month, for ever) has as spent must be the sum of its
rows. A rolling window is filled from the ledger when the store has forgotten, but not compared: the store knows only
when a request ended, and to a fraction of a second. Rates and slots are nobody's memory. A request that has just ended is
in one and not yet in the other, so a difference counts only when it stays (`settled`). Rows whose usage nobody knows
count nothing here; the store has what they had reserved.
"""

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from gateway.config import StorageConfig
from gateway.limit_storage import open_redis_store
from gateway.stores.limit_sqlite import SqliteLimitStore
from gateway.stores.limit_store import LimitStore
from gateway.stores.sqlite import Connection
from policies.access import is_listed
from policies.limits.limit import EVERY, SLOT_MEASURES, Level, Limit
from policies.limits.messages import Counter, Update

_MEMBER: Final[dict[Level, str]] = {
    "org": "organisation",
    "team": "team",
    "key": "key_id",
    "user": "end_user",
    "model": "requested_model",
    "tag": "tag.value",
}
_NAMED: Final[dict[Level, str]] = {
    level: "? IN (key_id, key_name)" if level == "key" else f"{column} = ?"
    for level, column in _MEMBER.items()
    if level != "model"
}
# A tag given twice counts once.
_TAGGED: Final = (
    "ledger JOIN (SELECT DISTINCT request_id AS id, each.value FROM ledger, json_each(ledger.tags) AS each "
    "WHERE {where}) AS tag ON tag.id = ledger.request_id"
)
_PROMPT: Final = "input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens"
_ENDED_US: Final = "(received_time_us + coalesce(duration_us, 0))"
_TIMEOUT_S: Final = 5.0
_LOOKS: Final = 5
_BETWEEN_LOOKS_S: Final = 1.0
_TTL_US: Final = 10_000_000
_BATCH: Final = 200  # counters in one update

Canonical = Callable[[str], str]  # a public model's name, for a name that clients use


class LedgerSpend(NamedTuple):
    """What the ledger says a counter has spent: units by the start of the period, or of the slice."""

    limit: Limit
    member: str
    counter: Counter
    spent: dict[int, int]

    @property
    def now(self) -> int:
        """Of the current period."""
        return self.spent.get(self.counter.periods[0], 0)


class Difference(NamedTuple):
    """One counter of a period: what the store has as spent, and what the ledger says. Units are the measure's."""

    limit: Limit
    member: str
    counter: Counter
    spent: int
    ledger: int

    @property
    def missing(self) -> int:
        """How much the store has too little; negative: too much."""
        return self.ledger - self.spent


def counting_store(settings: StorageConfig) -> LimitStore:
    """The store itself, which says so when it is away: what a guard answers in its place is not what was counted."""
    if settings.redis is None:
        return SqliteLimitStore(settings.directory)
    return open_redis_store(settings.redis, timeout_s=_TIMEOUT_S)


def ledger_spend(
    connection: Connection, limits: Iterable[Limit], now_us: int, canonical: Canonical
) -> list[LedgerSpend]:
    """What the ledger says of every counter that remembers: of all named members, and of those of `*` that have rows."""
    found: dict[str, LedgerSpend] = {}
    # A limit of a named member takes the place of one of everybody's, under the same key.
    for limit in sorted(limits, key=lambda limit: limit.scope.name != EVERY):
        counter = limit.counter(EVERY, now_us)
        if limit.measure in SLOT_MEASURES or counter.kind == "rate":
            continue
        members = _by_member(connection, limit, counter, now_us, canonical)
        if limit.scope.name != EVERY and not members:
            members[limit.scope.name] = {}
        for member, spent in members.items():
            own = limit.counter(member, now_us)
            found[own.key] = LedgerSpend(limit, member, own, spent)
    return list(found.values())


def _by_member(
    connection: Connection, limit: Limit, counter: Counter, now_us: int, canonical: Canonical
) -> dict[str, dict[int, int]]:
    level, name = limit.scope.level, limit.scope.name
    if counter.kind == "rolling":
        start = f"{_ENDED_US} - {_ENDED_US} % {counter.slice_us}"
        # Two days for the longest of answers, so that the index on time can be used.
        first_us = now_us - counter.window_us - counter.slice_us
        where = f"received_time_us >= {first_us - 172_800_000_000} AND {_ENDED_US} >= {first_us}"
    else:
        start = str(counter.periods[0])
        where = f"received_time_us >= {counter.periods[0]} AND received_time_us < {counter.periods[1]}"
    source = _TAGGED.format(where=where) if level == "tag" else "ledger"
    bindings: tuple[str, ...] = ()
    if name != EVERY and level in _NAMED:
        where, bindings = f"{where} AND {_NAMED[level]}", (name,)
    found: dict[str, dict[int, int]] = {}
    for member, model, at_us, units in connection.execute(
        f"SELECT {_MEMBER[level]}, requested_model, {start}, coalesce(sum({_units(limit)}), 0) "  # noqa: S608 - own texts
        f"FROM {source} WHERE {where} GROUP BY 1, 2, 3",
        bindings,
    ):
        model_name = canonical(model)
        who = model_name if level == "model" else member
        if (
            not who
            or not is_listed(model_name, limit.models)
            or (level == "model" and name not in (EVERY, who))
        ):
            continue
        spent = found.setdefault(who, {})
        spent[at_us] = spent.get(at_us, 0) + units
    return found


def _units(limit: Limit) -> str:
    """What a row counts, as the policy settles it: nothing that was never sent."""
    discount = 100 - limit.cached_weight_percent
    prompt = f"{_PROMPT} - cache_read_tokens * {discount} / 100" if discount else _PROMPT
    units = {
        "money": "cost_nanousd",
        "requests": "1",
        "tokens": f"{prompt} + output_tokens",
        "input_tokens": prompt,
        "output_tokens": "output_tokens",
    }[limit.measure]
    return f"CASE WHEN attempts > 0 AND ended <> 'interrupted' THEN {units} END"


async def compare(store: LimitStore, spend: Sequence[LedgerSpend]) -> list[Difference]:
    """Every counter of a period, different or not. StoreAwayError when the store does not say."""
    counted = [one for one in spend if one.counter.kind == "period"]
    compared: list[Difference] = []
    for start in range(0, len(counted), _BATCH):
        batch = counted[start : start + _BATCH]
        _, readings = await store.read([one.counter for one in batch])
        compared += [
            Difference(one.limit, one.member, one.counter, reading.spent, one.now)
            for one, reading in zip(batch, readings, strict=True)
        ]
    return compared


async def settled(
    look: Callable[[], Awaitable[list[Difference]]],
    looks: int = _LOOKS,
    wait: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Difference]:
    """The differences that stay: of several looks the smallest, and none if its sign changed."""
    kept = {one.counter.key: one for one in await look() if one.missing}
    for _ in range(looks - 1):
        if not kept:
            break
        await wait(_BETWEEN_LOOKS_S)
        now = {one.counter.key: one for one in await look()}
        kept = {key: less for key, one in kept.items() if (less := _less(one, now.get(key))) is not None}
    return sorted(kept.values(), key=lambda one: one.counter.key)


def _less(one: Difference, other: Difference | None) -> Difference | None:
    if other is None or other.counter.periods != one.counter.periods or one.missing * other.missing <= 0:
        return None
    return min(one, other, key=lambda each: abs(each.missing))


async def correct(store: LimitStore, differences: Sequence[Difference]) -> None:
    """Posts what is missing, takes back what is too much. After StoreAwayError nobody knows: compare again."""
    await _post(store, [(one.counter, {one.counter.periods[0]: one.missing}) for one in differences])


async def refill(store: LimitStore, spend: Sequence[LedgerSpend]) -> list[LedgerSpend]:
    """Gives rolling windows of which the store remembers nothing what the ledger knows of them. Returns those."""
    rolling = [one for one in spend if one.counter.kind == "rolling" and any(one.spent.values())]
    forgotten: list[LedgerSpend] = []
    for start in range(0, len(rolling), _BATCH):
        batch = rolling[start : start + _BATCH]
        _, readings = await store.read([one.counter for one in batch])
        forgotten += [one for one, reading in zip(batch, readings, strict=True) if not reading.spent]
    await _post(store, [(one.counter, one.spent) for one in forgotten])
    return forgotten


async def _post(store: LimitStore, posts: Sequence[tuple[Counter, Mapping[int, int]]]) -> None:
    for start in range(0, len(posts), _BATCH):
        batch = posts[start : start + _BATCH]
        await store.update(
            Update(
                holder=f"reconcile-{secrets.token_hex(6)}",
                number=1,
                ttl_us=_TTL_US,
                counters=tuple(counter for counter, _ in batch),
                posts=tuple(
                    (index, at_us, units)
                    for index, (_, spent) in enumerate(batch)
                    for at_us, units in spent.items()
                    if units
                ),
                is_last=True,
            )
        )


def names_of(aliases: Mapping[str, str]) -> Canonical:
    """From the configuration's aliases."""
    return lambda name: aliases.get(name, name)
