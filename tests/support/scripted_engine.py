"""Engines that do what a script says, and a clock that moves when the test says so: what a Replica is surrounded by."""

import asyncio
import dataclasses
import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from local_engine.plan import EngineEndpoint, MemoryEstimate, ReplicaPlan
from local_engine.replica import Replica
from local_engine.supervision_config import SupervisionConfig
from local_engine.surroundings import Event, Surroundings, Work


def a_plan(slot: int = 0, pool: str = "gpu", **changes) -> ReplicaPlan:
    name = f"{pool}/{slot}"
    plan = ReplicaPlan(
        name=name,
        pool=pool,
        slot=slot,
        argv=("vllm", "serve", "--port", str(18000 + slot)),
        env={},
        host="127.0.0.1",
        port=18000 + slot,
        ports=(18000 + slot,),
        endpoints=(EngineEndpoint(name, f"http://127.0.0.1:{18000 + slot}/v1", None, "0"),),
        sockets=(Path("/nowhere/kv"),),
        probe_model="tiny",
        api_key="k",
        memory=MemoryEstimate(0, 0, 0, 0),
        start_timeout_s=100.0,
        drain_timeout_s=30.0,
        stop_timeout_s=20.0,
    )
    return dataclasses.replace(plan, **changes)


class ScriptedClock:
    """Moves only by `advance`, from one sleeper to the next; everything that can run runs in between."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        told = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now + seconds, next(self._order), told))
        await told

    async def advance(self, seconds: float) -> None:
        end_at = self._now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= end_at:
            at, _, told = heapq.heappop(self._sleepers)
            self._now = max(self._now, at)
            if not told.done():
                told.set_result(None)
                await self.settle()
        self._now = end_at
        await self.settle()

    def jump(self, seconds: float) -> None:
        """Time passes in which nothing ran: whoever should have woken is late."""
        self._now += seconds

    async def settle(self) -> None:
        for _ in range(60):
            await asyncio.sleep(0)


class ScriptedProcess:
    """`exits` on SIGTERM after `term_s` of the clock (None: never), on SIGKILL unless `outlives_kills` are left."""

    _pids = itertools.count(100)

    def __init__(self, world: "World", plan: ReplicaPlan) -> None:
        self.pid = next(self._pids)
        self.plan = plan
        self.said = ""
        self.signals: list[str] = []
        self.is_clean = False
        self._world = world
        self._exit: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int | None:
        return await asyncio.shield(self._exit)

    def exit(self, code: int | None, said: str = "") -> None:
        self.said += said
        if not self._exit.done():
            self._exit.set_result(code)

    @property
    def is_alive(self) -> bool:
        return not self._exit.done()

    def terminate(self) -> None:
        self.signals.append("TERM")
        self._world.happened.append(f"{self.plan.name} TERM")
        if self._world.term_s is not None:
            self._ending = asyncio.ensure_future(self._exit_after(self._world.term_s))

    def kill(self) -> None:
        self.signals.append("KILL")
        if self._world.outlives_kills > 0:
            self._world.outlives_kills -= 1
        else:
            self.exit(137)

    async def observe(self) -> None:
        pass

    def tail(self) -> str:
        return self.said

    async def clean(self) -> None:
        assert not self.is_alive, "cleaned up while it lives"
        self.is_clean = True

    async def _exit_after(self, seconds: float) -> None:
        await self._world.clock.sleep(seconds)
        self.exit(0)


class World:
    """Everything around replicas. A test changes what it does while it runs."""

    def __init__(self, starts: int = 4) -> None:
        self.clock = ScriptedClock()
        self.processes: list[ScriptedProcess] = []
        self.happened: list[str] = []  # in order: launches, opens, closes, signals
        self.events: list[Event] = []
        self.launch_errors: list[OSError] = []
        self.adoptable: dict[str, ScriptedProcess] = {}
        # What engines do.
        self.dies_at_start: str | None = None  # with this log
        self.up_after_s = 2.0
        self.is_listening = True
        self.probe = ""
        self.doing: dict[str, Work] | None = {"0": Work(0, 0.0)}
        self.sleeps = self.wakes = True
        self.term_s: float | None = 1.0
        self.outlives_kills = 0
        self.requests: dict[str, int | None] = defaultdict(int)
        self._launched_at: dict[str, float] = {}
        self.around = Surroundings(
            self, self, self, self.clock, asyncio.Semaphore(starts), self.events.append
        )

    def replica(self, plan: ReplicaPlan | None = None, **settings) -> Replica:
        return Replica(plan or a_plan(), SupervisionConfig(**settings), self.around)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    async def until(self, condition: Callable[[], bool], within_s: float = 600.0) -> None:
        """In the clock's time."""
        left_s = within_s
        while not condition():
            assert left_s > 0, f"it did not happen: {self.happened[-8:]}"
            await self.clock.advance(0.1)
            left_s -= 0.1

    # Launcher

    def adopt(self, plan: ReplicaPlan) -> ScriptedProcess | None:
        return self.adoptable.pop(plan.name, None)

    async def launch(self, plan: ReplicaPlan) -> ScriptedProcess:
        if self.launch_errors:
            raise self.launch_errors.pop(0)
        process = ScriptedProcess(self, plan)
        self.processes.append(process)
        self.happened.append(f"{plan.name} launch")
        self._launched_at[plan.name] = self.clock.now()
        if self.dies_at_start is not None:
            process.exit(1, self.dies_at_start)
        return process

    # Prober

    async def is_up(self, plan: ReplicaPlan) -> bool:
        return (
            self.is_listening and self.clock.now() - self._launched_at.get(plan.name, 0.0) >= self.up_after_s
        )

    async def generate(self, plan: ReplicaPlan) -> str:
        return self.probe

    async def work(self, plan: ReplicaPlan) -> dict[str, Work] | None:
        return self.doing

    async def sleep(self, plan: ReplicaPlan) -> bool:
        self.happened.append(f"{plan.name} sleep")
        return self.sleeps

    async def wake(self, plan: ReplicaPlan) -> bool:
        self.happened.append(f"{plan.name} wake")
        return self.wakes

    # Rotation

    def open(self, plan: ReplicaPlan) -> None:
        self.happened.append(f"{plan.name} open")

    def close(self, plan: ReplicaPlan) -> None:
        self.happened.append(f"{plan.name} close")

    async def in_flight(self, plan: ReplicaPlan) -> int | None:
        return self.requests[plan.name]
