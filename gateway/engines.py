"""The vLLM engines of this service: from the configuration to running replicas, and from these to the workers' endpoints.

Owns the joining: plans made of the configuration, the supervisor that carries them out, which endpoints take requests, and
who is told. What one engine does is `local_engine`; what workers make of it is theirs. Engines outlive a gateway that is
killed by `engines.orphan_grace_s`: the next one takes over those whose plan it shares, and ends the others.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Final, Protocol

from pydantic import SecretStr

from backends.member import Member
from gateway.config import Config
from gateway.gpu_watch import GpuWatch
from gateway.placed import PlacedPool
from local_engine.engine_process import EngineProcess, Launcher, leftovers
from local_engine.engine_records import EngineRecords, TakenError
from local_engine.free_ports import FreePorts
from local_engine.gpus import this_machine
from local_engine.orders import orders_of
from local_engine.plan import EngineEndpoint, PlanError, ReplicaPlan, Site
from local_engine.probing import HttpProber
from local_engine.processes import StartError
from local_engine.replica import Replica
from local_engine.run_directory import leave, make, run_directory
from local_engine.scaling import PoolLoad, Scaler
from local_engine.supervisor import PoolOfReplicas, PoolOrder, Supervisor
from local_engine.surroundings import Event, Surroundings
from local_engine.vllm_config import VllmConfig

DIRECTORY: Final = "engines"
_SCALE_S: Final = 2.0
_KEY_BYTES: Final = 24
_END_S: Final = 30.0  # for an engine of an earlier run, from SIGTERM to SIGKILL

_log = logging.getLogger(__name__)


class Workers(Protocol):
    """Who is told, and asked."""

    def open_endpoint(self, name: str, *, is_open: bool) -> None: ...
    async def in_flight(self, endpoints: Sequence[str]) -> int | None:
        """Requests there; None: not known."""

    async def collect(self) -> None:
        """Their figures, as of now."""

    def pool_load(self, pool: str, ready: int) -> PoolLoad: ...
    def republish(self) -> None:
        """Endpoints have other addresses: every worker gets all of them anew, soon."""

    def engine_event(self, event: Event) -> None: ...


class LoopClock:
    """The running loop's time."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Engines:
    """All of them. Nothing is touched, and no directory made, while no pool has a `vllm` block."""

    def __init__(self, storage: Path, workers: Workers) -> None:
        self._storage = storage
        self._workers = workers
        self._ports = FreePorts()
        self._key = ""
        self._gpus = GpuWatch()
        self._records: EngineRecords | None = None
        self._prober: HttpProber | None = None
        self._supervisor: Supervisor | None = None
        self._published: dict[str, tuple[str, str]] = {}  # base URL and key by endpoint
        self._open: set[str] = set()
        self._scalers: dict[str, Scaler] = {}
        self._scaling: asyncio.Task[None] | None = None

    async def start(self, config: Config) -> None:
        """Returns when what an earlier gateway left is ended or offered for adoption; engines become ready later.

        StartError: the configuration does not fit the machine, or another gateway has the engines.
        """
        if _specs(config) or (self._storage / DIRECTORY).exists():
            try:
                await self._begin(config)
                self.apply(config)
            except (PlanError, TakenError) as error:
                raise StartError(str(error)) from error

    def apply(self, config: Config) -> None:
        """What is wanted from now on. PlanError, and nothing is changed."""
        orders = self._orders(config)
        if self._supervisor is None:
            return
        self._supervisor.apply(orders)
        scales = {name: spec.scale for name, spec in _specs(config).items() if spec.scale is not None}
        kept = {name: old for name, old in self._scalers.items() if scales.get(name) == old.settings}
        self._scalers = {name: kept.get(name) or Scaler(scale) for name, scale in scales.items()}
        if self._scalers and self._scaling is None:
            self._scaling = asyncio.create_task(self._scale())

    async def start_late(self, config: Config) -> None:
        """Before `apply` of a reload that brings the first pool of engines. StartError as `start`."""
        if self._supervisor is None and _specs(config):
            try:
                await self._begin(config)
            except (PlanError, TakenError) as error:
                raise StartError(str(error)) from error

    async def stop(self) -> None:
        """Everything ends, by group."""
        if self._scaling is not None:
            self._scaling.cancel()
            await asyncio.wait({self._scaling})
        if self._supervisor is not None:
            await self._supervisor.end()
        if self._prober is not None:
            await self._prober.close()
        if self._records is not None:
            self._records.close()
            leave(run_directory(self._storage))
        self._gpus.close()

    def placed(self) -> dict[str, PlacedPool]:
        """Members of the pools, open or not, by pool. What is told to workers after this is told by name."""
        pools = {} if self._supervisor is None else self._supervisor.pools
        self._published = {
            endpoint.name: (endpoint.base_url, replica.plan.api_key)
            for pool in pools.values()
            for replica in pool.replicas
            for endpoint in replica.plan.endpoints
        }
        return {
            name: PlacedPool(
                members=tuple(
                    self._member(replica, endpoint)
                    for replica in pool.replicas
                    for endpoint in replica.plan.endpoints
                )
            )
            for name, pool in pools.items()
        }

    # What the operator may ask for; SupervisorError with the reason when it cannot be.

    @property
    def supervisor(self) -> Supervisor:
        """StartError: there are none."""
        if self._supervisor is None:
            raise StartError("no pool has engines that Headgate runs")
        return self._supervisor

    def wanted(self, pool: str) -> None:
        """Requests wait for a pool of which nothing takes any."""
        found = self._supervisor.pools.get(pool) if self._supervisor is not None else None
        if found is not None and found.is_asleep:
            _log.info("engines are woken by a request", extra={"pool": pool})
            found.wake()

    def view(self) -> list[dict[str, Any]]:
        """For operators, by pool. No secret."""
        if self._supervisor is None:
            return []
        return [
            {
                "pool": pool.name,
                "wanted": pool.wanted,
                "ready": pool.ready,
                "slots": pool.order.slots,
                "is_asleep": pool.is_asleep,
                "change": pool.change,
                "problem": self._supervisor.problems.get(pool.name, ""),
                "replicas": [self._view_of(replica) for replica in pool.replicas],
            }
            for pool in self._supervisor.pools.values()
        ]

    # The rotation of `local_engine.surroundings`.

    def open(self, plan: ReplicaPlan) -> None:
        self._set_open(plan, is_open=True)

    def close(self, plan: ReplicaPlan) -> None:
        self._set_open(plan, is_open=False)

    async def in_flight(self, plan: ReplicaPlan) -> int | None:
        return await self._workers.in_flight([endpoint.name for endpoint in plan.endpoints])

    def _set_open(self, plan: ReplicaPlan, *, is_open: bool) -> None:
        for endpoint in plan.endpoints:
            (self._open.add if is_open else self._open.discard)(endpoint.name)
        if is_open and any(
            self._published.get(endpoint.name) != (endpoint.base_url, plan.api_key)
            for endpoint in plan.endpoints
        ):
            self._workers.republish()
            return
        for endpoint in plan.endpoints:
            self._workers.open_endpoint(endpoint.name, is_open=is_open)

    def _member(self, replica: Replica, endpoint: EngineEndpoint) -> Member:
        return Member(
            name=endpoint.name,
            base_url=endpoint.base_url,
            rank=endpoint.rank,
            engine=endpoint.engine,
            role=replica.plan.role,
            is_open=endpoint.name in self._open,
            api_key=SecretStr(replica.plan.api_key),
            kv_events=endpoint.kv_events,
            kv_replay=endpoint.kv_replay,
        )

    async def _begin(self, config: Config) -> None:
        self._records = records = EngineRecords(self._storage / DIRECTORY)
        make(run_directory(self._storage))
        launcher = Launcher(records, config.engines, self._ports, os.environ)
        self._prober = HttpProber()
        around = Surroundings(
            launcher,
            self._prober,
            self,
            LoopClock(),
            asyncio.Semaphore(config.engines.starts_at_once),
            self._workers.engine_event,
        )
        self._supervisor = Supervisor(around, self._workers.republish)
        await self._take_over(config, launcher, leftovers(records))

    async def _take_over(self, config: Config, launcher: Launcher, found: list[EngineProcess]) -> None:
        """Engines of a gateway that is gone: those of a pool that still is there may be adopted, the others end."""
        specs, own_keys = _specs(config), _own_keys(config)
        adoptable = [
            engine
            for engine in found
            if engine.record.guard_id.is_alive() and engine.record.living() and engine.record.pool in specs
        ]
        for engine in adoptable:
            record = engine.record
            if record.pool not in own_keys:
                self._key = self._key or record.api_key
            if record.ports is not None:
                self._ports.hold(record.name, *record.ports)
        self._key = self._key or secrets.token_urlsafe(_KEY_BYTES)
        plans = {plan.name: plan for order in self._orders(config).values() for plan in order.plans}
        ending = []
        for engine in found:
            plan = plans.get(engine.record.name)
            if engine in adoptable and plan is not None and launcher.is_of(engine.record, plan):
                launcher.offer(engine.record)
                _log.info("an engine of an earlier run is taken over", extra={"engine": engine.record.name})
            else:
                ending.append(engine)
        await asyncio.gather(*(_end(engine) for engine in ending))

    def _orders(self, config: Config) -> dict[str, PoolOrder]:
        specs = _specs(config)
        if not specs:
            return {}
        site = Site(this_machine(os.environ), self._ports, run_directory(self._storage), api_key=self._key)
        return orders_of(specs, site, _own_keys(config))

    async def _scale(self) -> None:
        while True:
            await asyncio.sleep(_SCALE_S)
            await (
                self._workers.collect()
            )  # by themselves they report now and then: a queue may come and go in between
            for name, scaler in self._scalers.items():
                pool = self._supervisor.pools.get(name) if self._supervisor is not None else None
                if pool is not None and not pool.change:
                    self._scale_one(pool, scaler)

    def _scale_one(self, pool: PoolOfReplicas, scaler: Scaler) -> None:
        now_time = datetime.now()  # noqa: DTZ005 - a schedule is by the machine's own clock
        load = self._workers.pool_load(pool.name, pool.ready)
        current = 0 if pool.is_asleep else pool.wanted
        if current == 0 and not pool.is_asleep:
            return  # the operator's word
        decision = scaler.decide(current, load, time.monotonic(), now_time)
        if decision.replicas == current:
            return
        _log.info(
            "a pool is scaled",
            extra={
                "pool": pool.name,
                "was": current,
                "replicas": decision.replicas,
                "reason": decision.reason,
                "waiting": load.waiting,
            },
        )
        if decision.replicas:
            pool.scale(decision.replicas)
        else:
            pool.sleep(scaler.settings.zero)

    def _view_of(self, replica: Replica) -> dict[str, Any]:
        plan = replica.plan
        return {
            "name": plan.name,
            "role": plan.role,
            "state": replica.state,
            "wish": replica.wish,
            "for_s": round(time.monotonic() - replica.since_at, 1),
            "pid": replica.process.pid if replica.process is not None else None,
            "port": plan.port,
            "gpus": [gpu.index for gpu in plan.gpus],
            **self._gpus.load(plan.gpus),
            "restarts": replica.restarts,
            "cause": replica.cause.text if replica.cause is not None else "",
            "log": str(self._records.log_path(plan.name)) if self._records is not None else "",
            "endpoints": [endpoint.name for endpoint in plan.endpoints],
        }


def _own_keys(config: Config) -> dict[str, str]:
    """By pool, where the configuration has one: engines on other machines are started with it, too."""
    keys = {name: pool.api_key for name, pool in config.pools.items() if pool.api_key is not None}
    return {name: key.get_secret_value() for name, key in keys.items() if key.get_secret_value()}


def _specs(config: Config) -> Mapping[str, VllmConfig]:
    return {name: pool.vllm for name, pool in config.pools.items() if pool.enabled and pool.vllm is not None}


async def _end(engine: EngineProcess) -> None:
    """One that nobody has a use for."""
    name = engine.record.name
    if engine.record.living():
        _log.warning("an engine of an earlier run is ended", extra={"engine": name})
        engine.terminate()
        try:
            async with asyncio.timeout(_END_S):
                await engine.wait()
        except TimeoutError:
            pass
    await engine.clean()
