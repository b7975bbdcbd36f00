"""Pools of real vLLM on the CPU as an operator writes them, for a gateway that supervises them, and a look into an engine."""

import contextlib
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

from local_engine.installed import look
from tests.engine.calls import ask
from tests.support.engine_pool import EnginePool
from tests.support.gateway_process import Gateway

ENVIRONMENT = Path(__file__).parents[2] / ".venv-engine"
PYTHON = ENVIRONMENT / "bin/python"
MODELS = ENVIRONMENT / "models"  # written by tests/engine/setup
READY_S = 1200.0  # half a minute on two free cores, and these are never free
STAYS_DEAD = {"backoff_s": 3600.0, "backoff_max_s": 3600.0}  # what a test kills


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
            # What has nothing left to do is not waited for: on busy cores it takes all the time it is given.
            "shutdown_timeout_s": 1,
            "env": env,
            **spec,
        }
    }


def session_at(gateway: Gateway, client: openai.OpenAI, endpoint: str, model: str = "tiny") -> str:
    """One of this client's whose home this is: one that is somewhere else for the moment would go home one day."""
    for n in range(64):
        raw = ask(client.with_raw_response, session=f"pin-{n}", model=model)
        row = gateway.row(raw.headers["x-request-id"], within_s=60)
        if (row["endpoint"], row["place_reason"]) == (endpoint, "home"):
            return f"pin-{n}"
    raise AssertionError(f"64 sessions, and none is at home at {endpoint}")


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


class Engine:
    """One that the gateway runs, found as an operator finds it: by `headgate engine status`."""

    def __init__(self, gateway: EnginePool, name: str) -> None:
        self.gateway, self.name = gateway, name
        self._root = f"http://127.0.0.1:{gateway.engines()[name]['port']}"

    @property
    def base_url(self) -> str:
        return f"{self._root}/v1"

    @property
    def state(self) -> str:
        return self.gateway.engines()[self.name]["state"]

    def metric(self, name: str) -> float:
        """Of the engine's own metrics page: `num_requests_running`; the sum over labels."""
        with urllib.request.urlopen(f"{self._root}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{")]
        assert values, f"no vllm:{name} on the metrics page"
        return sum(values)

    def health(self) -> int:
        """What its own page says."""
        with urllib.request.urlopen(f"{self._root}/health", timeout=60) as answer:
            return answer.status

    def core(self, name: str = "EngineCore") -> int:
        """The process that computes; it has another name than the one that speaks HTTP. With ranks, `EngineCore_DP1`."""
        members = self.gateway.processes(self.name)
        cores = [one.pid for one in members if name in Path(f"/proc/{one.pid}/cmdline").read_text()]
        assert len(cores) == 1, cores
        return cores[0]
