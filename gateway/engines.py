"""Engine processes that belong to pools: started with the service, on ports of this machine, ended with it.

Owns which engines run and where. A worker knows nothing of this: it gets a configuration in which a pool of
simulators has become a pool of addresses.
"""

import asyncio
import functools
import sys
from collections.abc import Callable
from typing import Final

from gateway.config import Config
from local_engine.config import SimulatorConfig
from local_engine.processes import Child, answers_ok, free_ports

_HOST: Final = "127.0.0.1"


class Engines:
    """All engine processes of this service. `on_restart` is told the name of one that died by itself."""

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

    def placed(self, config: Config) -> Config:
        """The configuration as a worker wants it: every pool has addresses."""
        pools = dict(config.pools)
        for name, addresses in self._addresses.items():
            if name in pools and pools[name].simulator is not None:
                update = {"endpoints": addresses, "simulator": None, "type": pools[name].type or "simulator"}
                pools[name] = pools[name].model_copy(update=update)
        return config.model_copy(update={"pools": pools})

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
    return [sys.executable, "-m", "local_engine.simulator", *options]
