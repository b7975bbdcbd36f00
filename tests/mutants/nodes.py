"""Broken builds of what several nodes share, that its tests must catch."""

import os

from msgspec.structs import replace

from gateway.stores.limit_redis import RedisLimitStore
from policies.limits.messages import Update
from policies.limits.substitute import Substitute


def counts_in_redis_for_each_worker() -> None:
    """What peers do: everybody has counters of their own."""
    update = RedisLimitStore._update

    async def apart(self, said: Update, mode: str):
        key = self._connection.key
        self._clock, self._holders = key(f"limits:clock:{os.getpid()}"), key(f"limits:holders:{os.getpid()}")
        await self._connection.call("HSETNX", self._clock, "filled", 1)
        self._connection.key = lambda name: key(f"{name}:{os.getpid()}")
        try:
            return await update(self, said, mode)
        finally:
            del self._connection.key

    RedisLimitStore._update = apart


def checks_then_adds_in_redis() -> None:
    """What peers do: it is read whether there is room, and what was taken is added a moment later."""
    update = RedisLimitStore._update

    async def late(self, said: Update, mode: str):
        if not said.groups:
            return await update(self, said, mode)
        stands = (await self.read(said.counters))[1]
        counters, taken = said.counters, list(said.claims)
        for group in said.groups:
            if all(units + stands[i].spent + stands[i].held <= counters[i].amount for i, units in group):
                taken += group
        reply = await update(self, replace(said, groups=(), claims=tuple(taken)), mode)
        return replace(reply, refusals=(None,) * len(said.groups))

    RedisLimitStore._update = late


def fills_with_nothing() -> None:
    """A Redis that lost its data begins with nothing spent."""
    fill = RedisLimitStore.fill
    RedisLimitStore.fill = lambda self, spent: fill(self, [])


def posts_again_what_was_in_doubt() -> None:
    """An answer that was lost is taken for an update that was lost."""
    end = Substitute.end
    Substitute.end = lambda self, *, is_posted: end(self, is_posted=False)


def forgets_what_was_in_doubt() -> None:
    """An update that was lost is taken for an answer that was lost."""
    end = Substitute.end
    Substitute.end = lambda self, *, is_posted: end(self, is_posted=True)


def keeps_no_posts() -> None:
    """What was spent while the store was away is told to nobody."""
    Substitute._keep = lambda self, update, now_us: None


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (
        counts_in_redis_for_each_worker,
        checks_then_adds_in_redis,
        fills_with_nothing,
        posts_again_what_was_in_doubt,
        forgets_what_was_in_doubt,
        keeps_no_posts,
    )
}
