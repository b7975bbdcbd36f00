"""A gateway whose pool of engines it runs itself, and what a test asks of it: the stand-in for vLLM, or vLLM."""

import asyncio
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from local_engine.process_table import ProcessId, group_members, identify
from tests.support.gateway_process import ROOT, Gateway
from tests.support.load import MODEL, Call, Load

FAKE = [sys.executable, str(ROOT / "tests/support/fake_vllm.py")]
PRICE = {"input": 1.0, "cached_input": 0.1, "output": 4.0}
# Long enough that some are in flight at any moment.
CHATS = (("/v1/chat/completions", False, 0, 50), ("/v1/chat/completions", True, 0, 50))


def fake_spec(**changes: Any) -> dict[str, Any]:
    """A `vllm` block that the stand-in serves."""
    spec = {
        "model": "org/tiny",
        "gpus": "none",
        "replicas": 2,
        "command": FAKE,
        "env": {"PYTHONPATH": str(ROOT), **changes.pop("env", {})},
        "extra_args": ["--time-scale", "0.2"],
        "kv_events": False,
        "max_model_len": 16384,
        "supervision": {"look_every_s": 0.5, "backoff_s": 0.2, **changes.pop("supervision", {})},
    }
    return spec | changes


class EnginePool(Gateway):
    """Its pool is `gpu`; the model `m` is served by it."""

    def __init__(self, directory: Path, spec: dict[str, Any], **settings: Any) -> None:
        settings = {
            "workers": 2,
            "engines": {"orphan_grace_s": 300},
            "models": {MODEL: {"targets": [{"pool": "gpu", "model": served_name(spec)}], "price": PRICE}},
            "logging": {"access": False},
            **settings,
        }
        super().__init__(
            directory, pools={"gpu": {"vllm": spec}, **settings.pop("more_pools", {})}, **settings
        )

    def stop(self, timeout_s: float = 180.0) -> int:
        """Real engines take their time."""
        return super().stop(timeout_s)

    def engines(self) -> dict[str, dict[str, Any]]:
        """The replicas by name."""
        pools = self.manage("/api/engines")["pools"]
        return {replica["name"]: replica for pool in pools for replica in pool["replicas"]}

    def pool(self, name: str = "gpu") -> dict[str, Any]:
        return next(pool for pool in self.manage("/api/engines")["pools"] if pool["pool"] == name)

    def states(self, pool: str = "gpu") -> list[str]:
        return [replica["state"] for replica in self.pool(pool)["replicas"]]

    def act(self, action: str, pool: str = "gpu", **body: Any) -> Any:
        return self.manage(f"/api/engines/{pool}/{action}", "POST", body)

    def wait(self, condition: Callable[[], bool], within_s: float = 90.0) -> None:
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"it did not happen:\n{self.log()[-4000:]}"
            time.sleep(0.1)

    async def until(self, condition: Callable[[], bool], within_s: float = 90.0) -> None:
        await asyncio.to_thread(self.wait, condition, within_s)

    def wait_ready(self, within_s: float = 90.0) -> None:
        self.wait(lambda: set(self.states()) == {"ready"}, within_s)

    def processes(self, name: str) -> list[ProcessId]:
        """Of one replica, its guard first."""
        pid = self.engines()[name]["pid"]
        return sorted(group_members(pid), key=lambda one: one.pid != pid)

    def main_process(self, name: str) -> int:
        """The one that speaks HTTP."""
        guard = self.engines()[name]["pid"]
        children = Path(f"/proc/{guard}/task/{guard}/children").read_text().split()
        return int(children[0])


def served_name(spec: dict[str, Any]) -> str:
    model = str(spec["model"])
    return model.rpartition("/")[2] if model.startswith("/") else model


def everything_of(gateway: EnginePool) -> set[ProcessId]:
    """All processes of all its engines."""
    return {one for name in gateway.engines() for one in gateway.processes(name)}


def any_alive(processes: set[ProcessId]) -> list[str]:
    return [
        f"{one.pid} {Path(f'/proc/{one.pid}/cmdline').read_text()[:80]}"
        for one in processes
        if one.is_alive()
    ]


def is_alive(pid: int) -> bool:
    found = identify(pid)
    return found is not None and found.is_alive()


def kill(pid: int) -> None:
    os.kill(pid, 9)


def a_load(gateway: EnginePool, clients: int = 4, seed: int = 1, **settings: Any) -> Load:
    return Load(gateway.port, clients, seed, kinds=CHATS, think_s=0.1, **settings)


def failed(calls: list[Call]) -> list[str]:
    """What clients saw go wrong."""
    return [
        f"{call.plan.serial}: {call.outcome}, status {call.status}, {'stream' if call.is_stream else 'whole'}"
        for call in calls
        if call.outcome != "ok" or (call.is_stream and not call.looks_complete)
    ]
