"""What operators may ask of engines over the management plane, against a supervisor of scripted ones."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from gateway.management.engines import ACTIONS, EngineBody, EngineRefusal, carry_out
from local_engine.processes import StartError
from local_engine.supervision_config import SupervisionConfig
from local_engine.supervisor import PoolOrder, Supervisor
from tests.support.scripted_engine import World, a_plan


class Engines:
    """As the management plane sees them."""

    def __init__(self, supervisor: Supervisor | None) -> None:
        self._supervisor = supervisor

    @property
    def supervisor(self) -> Supervisor:
        if self._supervisor is None:
            raise StartError("no pool has engines that Headgate runs")
        return self._supervisor

    def view(self):
        return [{"pool": name, "wanted": pool.wanted} for name, pool in self.supervisor.pools.items()]


@pytest.fixture
async def engines() -> AsyncIterator[Engines]:
    world = World()
    supervisor = Supervisor(world.around)
    supervisor.apply({"gpu": PoolOrder((a_plan(0), a_plan(1)), 2, 2, SupervisionConfig())})
    await world.until(lambda: supervisor.pools["gpu"].ready == 2)
    yield Engines(supervisor)
    ending = asyncio.create_task(supervisor.end())
    await world.until(ending.done)


async def test_every_action_is_carried_out(engines):
    bodies = {"scale": EngineBody(replicas=1), "drain": EngineBody(slot=1)}
    for action in (*ACTIONS[1:], "restart"):
        told = carry_out(engines, "gpu", action, bodies.get(action, EngineBody()))
        assert told["pool"] == "gpu"
    assert engines.supervisor.find("gpu").change == "restart"


async def test_what_cannot_be_is_refused_with_what_to_change(engines):
    with pytest.raises(EngineRefusal, match=r"raise vllm\.replicas or scale\.max"):
        carry_out(engines, "gpu", "scale", EngineBody(replicas=3))
    with pytest.raises(EngineRefusal, match="other is no pool with engines of Headgate's: gpu"):
        carry_out(engines, "other", "wake", EngineBody())
    with pytest.raises(ValueError, match="Say how many: `replicas`"):
        carry_out(engines, "gpu", "scale", EngineBody())
    with pytest.raises(ValueError, match="`sleep` is for a whole pool"):
        carry_out(engines, "gpu", "sleep", EngineBody(slot=1))
    with pytest.raises(EngineRefusal, match="no pool has engines that Headgate runs"):
        carry_out(Engines(None), "gpu", "restart", EngineBody())
