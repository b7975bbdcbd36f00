"""Pools of scripted engines: replaced one after another, scaled, put to sleep, taken away."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator

import pytest

from local_engine.supervision_config import SupervisionConfig
from local_engine.supervisor import PoolOrder, Supervisor, SupervisorError
from tests.support.scripted_engine import World, a_plan


def an_order(replicas: int = 2, *, more: int = 0, surge: int = 0, **changes) -> PoolOrder:
    """`replicas` of `replicas + more` slots are wanted."""
    slots = replicas + more
    plans = tuple(a_plan(slot, **changes) for slot in range(slots + surge))
    return PoolOrder(plans, replicas, slots, SupervisionConfig(surge=surge, crash_loop=2))


@contextlib.asynccontextmanager
async def supervising(world: World, **orders: PoolOrder) -> AsyncIterator[Supervisor]:
    supervisor = Supervisor(world.around)
    supervisor.apply(orders)
    try:
        yield supervisor
    finally:
        ending = asyncio.create_task(supervisor.end())
        await world.until(ending.done)
        assert not [process for process in world.processes if process.is_alive]


def states(supervisor: Supervisor, pool: str = "gpu") -> list[str]:
    return [replica.state for replica in supervisor.pools[pool].replicas]


async def until_ready(world: World, supervisor: Supervisor, count: int) -> None:
    await world.until(lambda: states(supervisor).count("ready") == count)


def fewest_open(happened: list[str], begin: int) -> int:
    """How many were candidates at the worst moment of what happened."""
    opened = begin
    fewest = opened
    for what in happened:
        opened += what.endswith("open")
        opened -= what.endswith("close")
        fewest = min(fewest, opened)
    return fewest


async def test_a_restart_replaces_one_after_another():
    world = World()
    async with supervising(world, gpu=an_order(3)) as supervisor:
        await until_ready(world, supervisor, 3)
        before = len(world.happened)
        supervisor.restart("gpu")
        await world.until(lambda: not supervisor.find("gpu").change)
        happened = world.happened[before:]
        assert [h for h in happened if not h.endswith("TERM")] == [
            f"gpu/{slot} {what}" for slot in range(3) for what in ("close", "launch", "open")
        ]
        assert fewest_open(happened, 3) == 2
        assert len(world.processes) == 6


async def test_with_a_surge_the_pool_is_never_smaller():
    world = World()
    async with supervising(world, gpu=an_order(2, surge=1)) as supervisor:
        await until_ready(world, supervisor, 2)
        assert states(supervisor) == ["ready", "ready", "planned"]
        before = len(world.happened)
        supervisor.restart("gpu")
        await world.until(lambda: not supervisor.find("gpu").change)
        assert fewest_open(world.happened[before:], 2) == 2
        assert [h for h in world.happened[before:] if not h.endswith("TERM")][:2] == [
            "gpu/2 launch",
            "gpu/2 open",
        ]
        await world.until(lambda: states(supervisor) == ["ready", "ready", "planned"])


async def test_a_pool_of_one_with_a_surge_always_has_a_candidate():
    world = World()
    async with supervising(world, gpu=an_order(1, surge=1)) as supervisor:
        await until_ready(world, supervisor, 1)
        before = len(world.happened)
        supervisor.restart("gpu")
        await world.until(lambda: not supervisor.find("gpu").change)
        assert fewest_open(world.happened[before:], 1) == 1


async def test_when_one_does_not_come_back_the_others_stay():
    world = World()
    async with supervising(world, gpu=an_order(3)) as supervisor:
        await until_ready(world, supervisor, 3)
        world.dies_at_start = "RuntimeError: Cannot find any model weights with `/models/tiny`\n"
        supervisor.restart("gpu")
        await world.until(lambda: not supervisor.find("gpu").change)
        assert states(supervisor) == ["crash_looped", "ready", "ready"]
        assert "gpu/0 does not come back" in supervisor.problems["gpu"]
        assert "the model is not there" in supervisor.problems["gpu"]
        world.dies_at_start = None
        supervisor.restart("gpu")
        await until_ready(world, supervisor, 3)
        await world.until(lambda: not supervisor.find("gpu").change)
        assert supervisor.problems == {}


async def test_another_plan_is_rolled_out_and_the_same_one_is_not():
    world = World()
    async with supervising(world, gpu=an_order(2)) as supervisor:
        await until_ready(world, supervisor, 2)
        supervisor.apply({"gpu": an_order(2)})
        await world.clock.advance(60)
        assert len(world.processes) == 2
        before = len(world.happened)
        supervisor.apply({"gpu": an_order(2, env={"NEW": "1"})})
        await world.until(lambda: len(world.processes) == 4 and not supervisor.find("gpu").change)
        assert fewest_open(world.happened[before:], 2) == 1
        assert all(replica.plan.env == {"NEW": "1"} for replica in supervisor.pools["gpu"].replicas)


async def test_a_newer_configuration_takes_over_from_one_that_is_being_rolled_out():
    world = World()
    async with supervising(world, gpu=an_order(3)) as supervisor:
        await until_ready(world, supervisor, 3)
        world.requests["gpu/0"] = 1
        supervisor.apply({"gpu": an_order(3, env={"V": "2"})})
        await world.clock.advance(5)
        supervisor.apply({"gpu": an_order(3, env={"V": "3"})})
        await world.clock.advance(5)
        world.requests["gpu/0"] = 0
        await world.until(lambda: not supervisor.find("gpu").change)
        assert {process.plan.env.get("V") for process in world.processes} == {None, "3"}
        assert states(supervisor) == ["ready"] * 3


async def test_a_pool_grows_and_shrinks_without_touching_who_stays():
    world = World()
    async with supervising(world, gpu=an_order(1, more=2)) as supervisor:
        await until_ready(world, supervisor, 1)
        supervisor.scale("gpu", 3)
        await until_ready(world, supervisor, 3)
        world.requests["gpu/2"] = 1
        supervisor.scale("gpu", 1)
        await world.clock.advance(5)
        assert states(supervisor) == ["ready", "planned", "draining"]
        world.requests["gpu/2"] = 0
        await world.until(lambda: states(supervisor) == ["ready", "planned", "planned"])
        assert [process.plan.slot for process in world.processes] == [0, 1, 2]
        with pytest.raises(SupervisorError, match="slots for 3 replicas, not for 4"):
            supervisor.scale("gpu", 4)


async def test_a_pool_is_not_scaled_to_those_that_answer_nobody():
    world = World()
    order = an_order(3)
    plans = tuple(
        dataclasses.replace(plan, role=role)
        for plan, role in zip(order.plans, ("prefill", "prefill", "decode"), strict=True)
    )
    async with supervising(world, gpu=order._replace(plans=plans)) as supervisor:
        await until_ready(world, supervisor, 3)
        for few in (1, 2):
            with pytest.raises(SupervisorError, match="nobody would answer"):
                supervisor.scale("gpu", few)
        supervisor.scale("gpu", 0)
        await world.until(lambda: states(supervisor) == ["planned"] * 3)


async def test_slots_come_and_go_with_the_configuration():
    world = World()
    async with supervising(world, gpu=an_order(1)) as supervisor:
        await until_ready(world, supervisor, 1)
        supervisor.apply({"gpu": an_order(3)})
        await until_ready(world, supervisor, 3)
        supervisor.apply({"gpu": an_order(2)})
        await world.until(lambda: states(supervisor) == ["ready", "ready"])
        assert len(world.processes) == 3


async def test_a_pool_that_is_gone_from_the_configuration_drains_and_ends_and_may_come_back():
    world = World()
    async with supervising(world, gpu=an_order(1), other=an_order(1, pool="other")) as supervisor:
        await world.until(lambda: states(supervisor) == states(supervisor, "other") == ["ready"])
        world.requests["gpu/0"] = 1
        supervisor.apply({"other": an_order(1, pool="other")})
        await world.clock.advance(5)
        assert world.processes[0].is_alive
        supervisor.apply({"gpu": an_order(1), "other": an_order(1, pool="other")})
        await world.until(lambda: states(supervisor) == ["ready"])
        world.requests["gpu/0"] = 0
        await world.clock.advance(5)
        assert world.processes[0].is_alive
        supervisor.apply({"other": an_order(1, pool="other")})
        await world.until(lambda: "gpu" not in supervisor.pools)
        assert states(supervisor, "other") == ["ready"]


async def test_a_pool_sleeps_where_it_can_and_ends_where_it_cannot():
    world = World()
    orders = {
        "gpu": an_order(2, can_sleep=True),
        "other": an_order(1, pool="other"),
    }
    async with supervising(world, **orders) as supervisor:
        await world.until(lambda: states(supervisor) + states(supervisor, "other") == ["ready"] * 3)
        supervisor.sleep("gpu")
        supervisor.sleep("other")
        await world.until(lambda: states(supervisor) == ["asleep"] * 2)
        await world.until(lambda: states(supervisor, "other") == ["planned"])
        supervisor.wake("gpu")
        supervisor.wake("other")
        await world.until(lambda: states(supervisor) + states(supervisor, "other") == ["ready"] * 3)
        assert len(world.processes) == 4


async def test_one_replica_is_drained_and_resumed():
    world = World()
    async with supervising(world, gpu=an_order(2)) as supervisor:
        await until_ready(world, supervisor, 2)
        supervisor.drain("gpu/1")
        await world.until(lambda: states(supervisor) == ["ready", "draining"])
        supervisor.drain("gpu/1", is_drained=False)
        await world.until(lambda: states(supervisor) == ["ready", "ready"])
        with pytest.raises(SupervisorError, match="no replica gpu/7"):
            supervisor.drain("gpu/7")
        with pytest.raises(SupervisorError, match="nothing is no pool"):
            supervisor.drain("nothing")


async def test_one_change_at_a_time():
    world = World()
    async with supervising(world, gpu=an_order(2)) as supervisor:
        await until_ready(world, supervisor, 2)
        world.requests["gpu/0"] = 1
        supervisor.restart("gpu")
        await world.clock.advance(1)
        for again in (lambda: supervisor.restart("gpu"), lambda: supervisor.scale("gpu", 1)):
            with pytest.raises(SupervisorError, match="a restart of gpu is under way"):
                again()
        world.requests["gpu/0"] = 0
        await world.until(lambda: not supervisor.find("gpu").change)


async def test_the_end_of_the_service_ends_what_is_starting_draining_and_asleep():
    world = World()
    world.term_s = None
    order = an_order(3, can_sleep=True)
    order = order._replace(
        plans=(order.plans[0], order.plans[1], dataclasses.replace(order.plans[2], start_timeout_s=1e6))
    )
    async with supervising(world, gpu=order) as supervisor:
        await until_ready(world, supervisor, 3)
        world.probe = "503"
        world.processes[2].exit(1)
        await world.until(lambda: states(supervisor)[2] == "probing")
        supervisor.drain("gpu/1")
        await world.until(lambda: states(supervisor)[1] == "draining")
    assert all(process.signals[-1] == "KILL" for process in world.processes if process.signals)
