"""The queue's kill test over two nodes that share a Redis, which is killed again and again, and flushed once.

Witnesses and judge are those of `tests.support.queue_run`; beside them both ledgers have to tell the same of every job.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

from gateway.limits_config import LimitConfig
from gateway.overflow.store import QueueStore
from tests.support.gateway_process import Gateway
from tests.support.load import loaded_gateway
from tests.support.nodes import NAMES, readings
from tests.support.queue_checker import Billed
from tests.support.queue_run import BUDGET, SUBMITTERS, QueueRun
from tests.support.queue_stores import redis_queue
from tests.support.redis_server import RedisServer

_AGREE_S = 180.0
_START_S = 300.0
_OBSERVE_S = 60.0


class NodesRun(QueueRun):
    """`await trouble(...)`, then ask for `faults`. Every client asks either node, whichever took its job."""

    def __init__(self, directory: Path, seed: int, jobs: int, **others: Any) -> None:
        super().__init__(directory, seed, jobs, **others)
        self.seen.forgets = True
        self.flushes = 0
        self._excused = {503}  # while Redis is away
        self._redis = RedisServer(directory / "redis", appendonly="yes", appendfsync="everysec")
        self._nodes: tuple[Gateway, ...] = ()

    async def trouble(self, kills: int, *, workers: int) -> None:
        """Hands in all jobs while Redis is killed so many times and flushed once; then waits for the rest.

        Everything is stopped when this returns."""
        with self._upstream, self._redis:
            async with self._receiver.receiving():
                self._nodes = tuple(self._node(name, workers) for name in NAMES)
                try:
                    await asyncio.gather(*(asyncio.to_thread(node.start, _START_S) for node in self._nodes))
                    await self._live(kills)
                    await asyncio.gather(*(asyncio.to_thread(node.stop) for node in self._nodes))
                finally:
                    for node in self._nodes:
                        node.kill()
            for node in self._nodes:
                if "Traceback" in (log := node.log()):
                    self._problems.append(
                        f"a traceback in the log: {log[log.index('Traceback') - 2000 :][:6000]}"
                    )
            await self._take_evidence()

    async def _live(self, kills: int) -> None:
        began_at = time.perf_counter()
        clients = [asyncio.create_task(self._client(self._nodes, n)) for n in range(SUBMITTERS)]
        troubles = ["kill"] * kills + ["flush"]
        self._chance.shuffle(troubles)
        for done, trouble in enumerate(troubles, 1):
            self._may_submit = self._jobs * done // len(troubles)
            await asyncio.sleep(self._chance.uniform(0.3, 2.0))
            if trouble == "flush":
                await asyncio.to_thread(self._redis.command, "FLUSHALL")
                self.flushes += 1
            else:
                await asyncio.to_thread(self._redis.kill)
                await asyncio.sleep(self._chance.uniform(0, 1.0))
                await asyncio.to_thread(self._redis.start)
                self.kills += 1
        self._may_submit = self._jobs
        await asyncio.gather(*clients)
        self._took_s["trouble"] = time.perf_counter() - began_at
        await self._rest(self._nodes[0])
        await self._agree()
        self._took_s["all"] = time.perf_counter() - began_at
        for node in self._nodes:
            await self._read_all(node)

    def _node(self, name: str, workers: int) -> Gateway:
        directory = self._directory / name
        directory.mkdir()
        shared = {"url": self._redis.url, "node": name, "timeout_ms": 2000}
        return loaded_gateway(
            directory,
            self._upstream.url,
            workers=workers,
            module=self._module,
            environ={"HEADGATE_TEST_MUTANT": self._mutant},
            storage={"directory": str(directory / "data"), "redis": shared},
            limits={"rules": [BUDGET]},
            queue={"enabled": True, "webhooks": {"networks": ["127.0.0.0/8"]}},
            **self._settings,
        )

    def _store(self) -> QueueStore:
        """A third node, which has promised nothing, and has time."""
        return redis_queue(self._redis, self._directory / "observer", tag="headgate", timeout_s=_OBSERVE_S)

    async def _agree(self) -> None:
        """Until both ledgers say the same of all jobs."""
        deadline = time.monotonic() + _AGREE_S
        while True:
            first, second = [await asyncio.to_thread(_job_rows, node) for node in self._nodes]
            if first == second:
                return
            if time.monotonic() > deadline:
                differ = {key for key in first.keys() | second.keys() if first.get(key) != second.get(key)}
                some = [(key, first.get(key), second.get(key)) for key in sorted(differ)[:3]]
                self._problems.append(f"I4: the nodes' ledgers differ in {len(differ)} jobs: {some}")
                return
            await asyncio.sleep(0.5)

    async def _billed(self) -> list[Billed]:
        rows = self._nodes[0].rows()
        return [Billed(row["request_id"], row["cost_nanousd"]) for row in rows]

    async def _held(self) -> int:
        limit = LimitConfig.model_validate(BUDGET).limit()
        deadline = time.monotonic() + 90
        while True:
            (reading,) = await readings(self._redis, (limit, "tests"))
            if not reading.held or time.monotonic() > deadline:
                return int(reading.held)
            await asyncio.sleep(0.5)


def _job_rows(node: Gateway) -> dict[str, tuple[Any, ...]]:
    """Of every job: what it cost, for which run of it."""
    names = ("cost_nanousd", "received_time_us", "input_tokens", "output_tokens")
    return {row["request_id"]: tuple(row[name] for name in names) for row in node.rows()}
