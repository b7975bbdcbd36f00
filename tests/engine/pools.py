"""Pools of real vLLM on the CPU as an operator writes them, for a gateway that supervises them."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from local_engine.installed import look
from tests.engine.vllm_process import ENVIRONMENT, MODELS
from tests.support.gateway_process import Gateway

READY_S = 1200.0  # half a minute on two free cores, and these are never free


def a_pool(model: str, **spec: Any) -> dict[str, Any]:
    """One of the tiny models. `env` adds to what engines need on few cores."""
    found = look(ENVIRONMENT)
    assert found is not None, "the engine is not installed: run tests/engine/setup"
    env = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **spec.pop("env", {})}
    return {
        "vllm": {
            "model": str(MODELS / model),
            "name": "tiny",
            "command": list(found.command),
            "gpus": "none",
            "enforce_eager": True,
            "kv_cache_memory_bytes": 67_108_864,
            "max_model_len": 4096,
            "prefix_caching": {"block_size": 32},
            "start_timeout_s": READY_S,
            "env": env,
            **spec,
        }
    }


@contextlib.contextmanager
def supervised(gateway: Gateway, *endpoints: str) -> Iterator[None]:
    """The gateway, while all of these take requests; its engines may take their time to end."""
    try:
        gateway.start()
        ready(gateway, *endpoints)
        yield
    finally:
        gateway.stop(timeout_s=READY_S)


def ready(gateway: Gateway, *endpoints: str, restarted: bool = False) -> None:
    """When all of these take requests; `restarted`: and their pools have nothing left to change."""
    deadline = time.monotonic() + READY_S
    while True:
        states = {told["name"]: told["state"] for told in gateway.manage("/api/status")["endpoints"]}
        pools = gateway.manage("/api/engines")["pools"]
        is_quiet = not restarted or not any(pool["change"] for pool in pools)
        if is_quiet and all(states.get(name) == "up" for name in endpoints):
            return
        problems = [pool["problem"] for pool in pools if pool["problem"]]
        assert not problems, problems
        assert time.monotonic() < deadline, (states, gateway.log()[-4000:])
        time.sleep(0.2)
