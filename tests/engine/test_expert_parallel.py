"""A mixture of experts spread over two ranks, by tensor and by data parallelism, in pools that the gateway supervises.

vLLM's CPU build cannot compute with experts on several ranks; `plugin/` supplies what it lacks, for tests only.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.engine.calls import LONG, ask, until
from tests.engine.pools import STAYS_DEAD, Engine, a_pool, supervised
from tests.support.engine_pool import EnginePool, any_alive
from tests.support.gateway_process import KEY

pytestmark = pytest.mark.engine

PLUGIN = Path(__file__).parent / "plugin/headgate_cpu_experts.py"
POOLS = {
    "gpu": {},
    "tensor": {"tensor_parallel_size": 2, "expert_parallel": {}},
    "ranks": {"data_parallel": {"size": 2}, "expert_parallel": {}, "supervision": STAYS_DEAD},
}
RANKS = ("ranks/0.r0", "ranks/0.r1")
PROMPTS = [f"Question {n}: " + "the water and the channel, " * (3 * n) for n in range(12)]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory) -> Iterator[EnginePool]:
    """All engines start side by side. In float32: rounding would choose other experts, and so other words."""
    path = installed(tmp_path_factory.mktemp("plugin"))
    pools = {
        name: a_pool("tiny-moe", dtype="float32", env={"PYTHONPATH": str(path)}, **spec)
        for name, spec in POOLS.items()
    }
    pools["ranks"]["placement"] = {"policy": "prefix", "kv_events": True, "tokenize_timeout_s": 30}
    models = {name: {"targets": [{"pool": name, "model": "tiny"}], "price": {"input": 1.0}} for name in pools}
    running = EnginePool(
        tmp_path_factory.mktemp("experts"),
        pools.pop("gpu")["vllm"],
        workers=1,
        more_pools=pools,
        models=models,
        engines={"starts_at_once": len(POOLS)},
    )
    with supervised(running, "gpu/0", "tensor/0", *RANKS):
        yield running


def installed(directory: Path) -> Path:
    """The plugin as Python's packages are: vLLM finds it by its entry point."""
    shutil.copy(PLUGIN, directory)
    metadata = directory / f"{PLUGIN.stem}-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN.stem}\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        f"[vllm.general_plugins]\n{PLUGIN.stem} = {PLUGIN.stem}:register\n"
    )
    return directory


@pytest.fixture(scope="module")
def client(gateway) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=120) as sdk:
        yield sdk


def answers(client, model):
    """All prompts at once, so that ranks have different numbers of tokens: text, and how sure the model was of it."""

    def answer(prompt):
        (choice,) = ask(client, prompt, model=model, max_tokens=16, logprobs=True).choices
        return choice.message.content, [token.logprob for token in choice.logprobs.content]

    with ThreadPoolExecutor(len(PROMPTS)) as threads:
        return list(threads.map(answer, PROMPTS))


@pytest.fixture(scope="module")
def alone(client):
    return answers(client, "gpu")


@pytest.mark.parametrize("model", ["tensor", "ranks"])
def test_experts_on_two_ranks_answer_what_one_process_answers(client, alone, model, capsys):
    together = answers(client, model)
    assert [text for text, _ in together] == [text for text, _ in alone]
    pairs = [
        (one, two)
        for (_, a), (_, b) in zip(alone, together, strict=True)
        for one, two in zip(a, b, strict=True)
    ]
    difference = max(abs(one - two) for one, two in pairs)
    with capsys.disabled():
        print(
            f"\n    {model}: {len(PROMPTS)} answers equal, largest difference of a logprob {difference:.1e}"
        )
    assert difference < 1e-3


def test_a_session_stays_with_its_rank_and_finds_its_cache_there(client, gateway):
    """A rank has a cache of its own. Each session begins with words of its own: else all would go where the first is warm."""
    homes = {}
    for n in range(64):
        session = f"rank-{n}"
        first, second = (
            gateway.row(ask(client, f"{session}: {LONG}", session, model="ranks")._request_id)
            for _ in range(2)
        )
        assert first["endpoint"] == second["endpoint"]
        assert second["cache_read_tokens"] == second["predicted_cached_tokens"] >= 256
        homes.setdefault(first["endpoint"], session)
        if len(homes) == 2:
            break
    assert set(homes) == set(RANKS)


def test_each_rank_tells_its_own_load_and_its_own_cache(client, gateway):
    def seen():
        return {e["name"]: e for e in gateway.manage("/api/status")["endpoints"] if e["name"] in RANKS}

    until(lambda: all(e.get("kv_events") == "complete" and e["kv_blocks"] for e in seen().values()), 60)
    stream = ask(
        client,
        "Endless",
        "somebody",
        model="ranks",
        stream=True,
        max_tokens=3000,
        extra_body={"ignore_eos": True},
    )
    target = stream.response.headers["x-headgate-target"]
    (other,) = set(RANKS) - {target}
    try:
        until(lambda: seen()[target]["running"] == 1 and seen()[other]["running"] == 0, 60)
    finally:
        stream.close()


def test_a_rank_that_dies_takes_the_others_along_and_nobody_is_left_waiting(client, gateway):
    """vLLM's server then hangs for some seconds, well by its own `/health`, before it ends. Nothing is alive after this."""
    stream = ask(
        client,
        "Endless",
        "nobody",
        model="ranks",
        stream=True,
        max_tokens=3900,
        extra_body={"ignore_eos": True},
    )
    next(stream)
    (other,) = set(RANKS) - {stream.response.headers["x-headgate-target"]}
    everything = gateway.processes("ranks/0")
    os.kill(Engine(gateway, "ranks/0").core(f"EngineCore_DP{other[-1]}"), signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    until(lambda: gateway.engines()["ranks/0"]["state"] == "backing_off")
    assert not any_alive(set(everything))
    states = {told["name"]: told["state"] for told in gateway.manage("/api/status")["endpoints"]}
    assert all(states[rank] != "up" for rank in RANKS)
