"""All engines of this service: what is wanted of each pool, replicas replaced one after another, how many there are.

Owns the pools' wishes and the order in which replicas are touched; what one of them does is `replica`. Refuses to know
requests, workers and where plans come from. Invariants: while a pool is replaced, at most one of its replicas (and those
a surge makes up for) is away; one change of a pool's replicas at a time.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Literal, NamedTuple

from local_engine.plan import ReplicaPlan
from local_engine.replica import Replica, Wish
from local_engine.supervision_config import SupervisionConfig
from local_engine.surroundings import Surroundings

_POLL_S: Final = 0.2

_log = logging.getLogger(__name__)

Zero = Literal["sleep", "stop"]


class SupervisorError(Exception):
    """What was asked for cannot be done now. The message says why."""


class PoolOrder(NamedTuple):
    """What a pool should be: a plan for every slot it may ever use, and how many of them are wanted at first.

    Slots from `slots` on are for a surge only.
    """

    plans: tuple[ReplicaPlan, ...]
    wanted: int
    slots: int
    settings: SupervisionConfig
    zero: Zero = "stop"


class PoolOfReplicas:
    """One pool's replicas, and what is going on with them."""

    def __init__(self, name: str, order: PoolOrder, around: Surroundings) -> None:
        self.name = name
        self.order = order
        self.wanted = order.wanted
        self.is_asleep = False  # by the operator's word or for want of requests: a request wakes it
        self.is_ending = False  # the configuration has it no more
        self.change = ""  # under way: "restart" or "end"; else nothing
        self.replicas: list[Replica] = []
        self._drained: set[int] = set()
        self._around = around
        self._runs: dict[Replica, asyncio.Task[None]] = {}
        for plan in order.plans:
            self._add(plan)
        self.apply_wishes()

    @property
    def ready(self) -> int:
        return sum(replica.state == "ready" for replica in self.replicas)

    def apply_wishes(self) -> None:
        """What is wanted of each replica follows from what is wanted of the pool."""
        for slot, replica in enumerate(self.replicas):
            replica.want(self._wish(slot))

    def scale(self, replicas: int) -> None:
        self.wanted = replicas
        self.is_asleep = False
        self.apply_wishes()

    def sleep(self, how: Zero) -> None:
        """Until somebody wants it."""
        self.is_asleep = True
        self.order = self.order._replace(zero=how)
        self.apply_wishes()

    def wake(self) -> None:
        self.is_asleep = False
        self.wanted = max(self.wanted, 1)
        self.apply_wishes()

    def drain(self, slot: int, *, is_drained: bool) -> None:
        (self._drained.add if is_drained else self._drained.discard)(slot)
        self.apply_wishes()

    async def replace(self, order: PoolOrder, surge: int) -> str:
        """Every replica by the plan of `order`, one after another; what went wrong, if something did."""
        for plan in order.plans[len(self.replicas) :]:
            self._add(plan)
        self.wanted = order.wanted if order.wanted != self.order.wanted else min(self.wanted, order.slots)
        self.order = order
        spare = [slot for slot in range(order.slots, len(order.plans)) if slot < len(self.replicas)][:surge]
        try:
            for slot in spare:
                self.replicas[slot].replace(order.plans[slot], order.settings)
                self.replicas[slot].want("ready")
            await self._settled([self.replicas[slot] for slot in spare])
            for slot in range(min(len(order.plans), len(self.replicas))):
                if slot in spare:
                    continue
                replica = self.replicas[slot]
                was_up = replica.state == "ready"
                replica.replace(order.plans[slot], order.settings)
                replica.want(self._wish(slot))
                await self._settled([replica])
                if was_up and replica.state == "crash_looped":
                    text = replica.cause.text if replica.cause is not None else "it does not start"
                    return f"{replica.plan.name} does not come back, so the others stay as they are: {text}"
        finally:
            self.apply_wishes()
        await self._retire(len(order.plans))
        return ""

    async def restart(self, surge: int) -> str:
        """Every replica that runs, one after another; those that are down are tried again, too."""
        order = self.order
        spare = [
            slot for slot in range(order.slots, len(self.replicas)) if self.replicas[slot].state == "planned"
        ][:surge]
        try:
            for slot in spare:
                self.replicas[slot].want("ready")
            await self._settled([self.replicas[slot] for slot in spare])
            for replica in self.replicas[: order.slots]:
                if replica.state == "planned":
                    continue
                replica.restart()
                await self._settled([replica])
                if replica.state == "crash_looped":
                    text = replica.cause.text if replica.cause is not None else "it does not start"
                    return f"{replica.plan.name} does not come back, so the others stay as they are: {text}"
        finally:
            self.apply_wishes()
        return ""

    async def end(self, drain_s: float) -> None:
        """All of them, side by side."""
        for run in self._runs.values():
            run.cancel()
        await asyncio.gather(*self._runs.values(), return_exceptions=True)
        await asyncio.gather(*(replica.end(drain_s) for replica in self.replicas))

    def _wish(self, slot: int) -> Wish:
        if slot >= self.order.slots or self.is_ending:
            return "stopped"
        if self.is_asleep:
            return "asleep" if slot < self.wanted and self.order.zero == "sleep" else "stopped"
        if slot >= self.wanted:
            return "stopped"
        return "drained" if slot in self._drained else "ready"

    def _add(self, plan: ReplicaPlan) -> None:
        replica = Replica(plan, self.order.settings, self._around)
        self.replicas.append(replica)
        self._runs[replica] = asyncio.create_task(self._run(replica), name=f"engine {plan.name}")

    async def _run(self, replica: Replica) -> None:
        try:
            await replica.run()
        except Exception:
            _log.exception("a bug ended the supervision of an engine", extra={"engine": replica.plan.name})
            raise

    async def _retire(self, count: int) -> None:
        """Slots that the new order does not have."""
        for replica in self.replicas[count:]:
            replica.want("stopped")
        await self._settled(self.replicas[count:])
        for replica in self.replicas[count:]:
            run = self._runs.pop(replica)
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)
            await replica.end(0.0)
        del self.replicas[count:]

    async def _settled(self, replicas: Sequence[Replica]) -> None:
        while not all(replica.is_settled for replica in replicas):
            await self._around.clock.sleep(_POLL_S)


class Supervisor:
    """All pools. `changed` is called after a pool came, went or has other plans."""

    def __init__(self, around: Surroundings, changed: Callable[[], None] = lambda: None) -> None:
        self.pools: dict[str, PoolOfReplicas] = {}
        self.problems: dict[str, str] = {}  # of the latest change, by pool
        self._around = around
        self._changed = changed
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def apply(self, orders: dict[str, PoolOrder]) -> None:
        """What is wanted from now on. Returns at once: pools are replaced in the background."""
        for name, order in orders.items():
            pool = self.pools.get(name)
            if pool is None:
                self.pools[name] = PoolOfReplicas(name, order, self._around)
            elif pool.order != order or pool.is_ending:
                pool.is_ending = False
                self._begin(pool, "restart", self._replace(pool, order), is_forced=True)
        for name in [name for name, pool in self.pools.items() if name not in orders and not pool.is_ending]:
            self._begin(self.pools[name], "end", self._remove(name), is_forced=True)

    def restart(self, pool: str, surge: int | None = None) -> None:
        """One after another. SupervisorError: not now, or there is no such pool."""
        found = self.find(pool)
        self._begin(
            found, "restart", self._restart(found, found.order.settings.surge if surge is None else surge)
        )

    def scale(self, pool: str, replicas: int) -> None:
        found = self.find(pool)
        self._may_change(found)
        if not 0 <= replicas <= found.order.slots:
            raise SupervisorError(
                f"{pool} has slots for {found.order.slots} replicas, not for {replicas}: raise vllm.replicas or scale.max"
            )
        if replicas and all(plan.role == "prefill" for plan in found.order.plans[:replicas]):
            raise SupervisorError(
                f"the first {replicas} of {pool} only compute prompts, and nobody would answer: more, or 0"
            )
        found.scale(replicas)

    def drain(self, name: str, *, is_drained: bool = True) -> None:
        """A replica (`pool/1`), or all of a pool."""
        pool, slash, slot = name.partition("/")
        found = self.find(pool)
        if slash and (not slot.isdecimal() or int(slot) >= found.order.slots):
            raise SupervisorError(f"there is no replica {name}; {pool} has {found.order.slots}")
        for number in [int(slot)] if slash else range(found.order.slots):
            found.drain(number, is_drained=is_drained)

    def sleep(self, pool: str) -> None:
        """Gives back what can be given back: by sleeping where the engine can, else by ending."""
        found = self.find(pool)
        self._may_change(found)
        can_sleep = any(replica.plan.can_sleep for replica in found.replicas)
        found.sleep("sleep" if can_sleep else "stop")

    def wake(self, pool: str) -> None:
        found = self.find(pool)
        found.wake()

    def find(self, pool: str) -> PoolOfReplicas:
        found = self.pools.get(pool)
        if found is None:
            there = ", ".join(sorted(self.pools)) or "there is none"
            raise SupervisorError(f"{pool} is no pool with engines of Headgate's: {there}")
        return found

    async def end(self, drain_s: float = 0.0) -> None:
        """Everything, side by side; each gets SIGTERM, then SIGKILL to its group."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.gather(*(pool.end(drain_s) for pool in self.pools.values()))

    def _may_change(self, pool: PoolOfReplicas) -> None:
        if pool.change:
            raise SupervisorError(f"a {pool.change} of {pool.name} is under way")

    def _begin(
        self, pool: PoolOfReplicas, change: str, work: Coroutine[Any, Any, str], *, is_forced: bool = False
    ) -> None:
        """One change of a pool at a time; a new configuration takes over from what was under way."""
        before = self._tasks.get(pool.name)
        try:
            if not is_forced:
                self._may_change(pool)
        except SupervisorError:
            work.close()
            raise
        pool.change = change
        self._tasks[pool.name] = asyncio.create_task(self._carry_out(pool, before, work))

    async def _carry_out(
        self, pool: PoolOfReplicas, before: asyncio.Task[None] | None, work: Coroutine[Any, Any, str]
    ) -> None:
        try:
            if before is not None and not before.done():
                before.cancel()
                await asyncio.wait({before})
            problem = await work
        except BaseException:
            work.close()
            raise
        if problem:
            _log.error("engines were not all replaced: %s", problem, extra={"pool": pool.name})
            self.problems[pool.name] = problem
        else:
            self.problems.pop(pool.name, None)
        pool.change = ""

    async def _replace(self, pool: PoolOfReplicas, order: PoolOrder) -> str:
        problem = await pool.replace(order, order.settings.surge)
        self._changed()
        return problem

    async def _restart(self, pool: PoolOfReplicas, surge: int) -> str:
        return await pool.restart(surge)

    async def _remove(self, name: str) -> str:
        pool = self.pools[name]
        pool.is_ending = True
        pool.apply_wishes()
        while any(replica.process is not None for replica in pool.replicas):
            await self._around.clock.sleep(_POLL_S)
        await pool.end(0.0)
        del self.pools[name]
        self._changed()
        return ""
