"""Engine simulators that belong to pools: started with the service, on ports of this machine, ended with it.

Owns which of them run and where. A worker is told their addresses as members of their pools (`gateway/placed.py`).
"""

import asyncio
import functools
import sys
from collections.abc import Callable
from typing import Final

from backends.member import Member
from gateway.config import Config
from gateway.placed import PlacedPool
from local_engine.config import SimulatorConfig
from local_engine.processes import Child, answers_ok, free_ports

_HOST: Final = "127.0.0.1"


class Simulators:
    """All simulators of this service. `on_restart` is told the name of one that died by itself."""

    def __init__(self, on_restart: Callable[[str], None]) -> None:
        self._on_restart = on_restart
        self._children: list[Child] = []
        self._addresses: dict[str, tuple[str, ...]] = {}

    async def start(self, config: Config) -> None:
        """Returns when all are ready; StartError when one is not, the others then being ended."""
        for name, pool in config.pools.items():
            if pool.enabled and pool.simulator is not None:
                ports = free_ports(pool.simulator.replicas, _HOST)
                self._addresses[name] = tuple(f"http://{_HOST}:{port}/v1" for port in ports)
                self._children += [
                    self._child(f"{name}/{replica}", pool.simulator, replica, port)
                    for replica, port in enumerate(ports)
                ]
        results = await asyncio.gather(*(child.start() for child in self._children), return_exceptions=True)
        for error in results:
            if isinstance(error, BaseException):
                await self.stop()
                raise error

    def placed(self) -> dict[str, PlacedPool]:
        """The pools' members, by pool."""
        return {
            name: PlacedPool(
                members=tuple(
                    Member(name=name if len(addresses) == 1 else f"{name}/{number}", base_url=address)
                    for number, address in enumerate(addresses)
                )
            )
            for name, addresses in self._addresses.items()
        }

    def children(self) -> list[Child]:
        return list(self._children)

    async def stop(self) -> None:
        await asyncio.gather(*(child.stop() for child in self._children))

    def _child(self, name: str, simulator: SimulatorConfig, replica: int, port: int) -> Child:
        is_ready = functools.partial(answers_ok, _HOST, port, "/health")
        return Child(name, _command(simulator, replica, port), is_ready, self._on_restart)


def _command(simulator: SimulatorConfig, replica: int, port: int) -> list[str]:
    settings = simulator.model_dump(exclude={"replicas", "seed"}, exclude_none=True, exclude_unset=True)
    settings |= {"host": _HOST, "port": port, "model": simulator.model, "seed": simulator.seed + replica}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    return [sys.executable, "-P", "-m", "local_engine.simulator", *options]
