"""Real vLLM with NIXL under the supervisor: one engine computes prompts, another answers them."""

import asyncio
import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.engine.calls import user
from tests.engine.pools import MODELS, PYTHON, STAYS_DEAD
from tests.support.engine_pool import EnginePool
from tests.support.gateway_process import KEY

pytestmark = pytest.mark.engine

START_S = 400.0  # of two engines at once, on two busy cores
WAIT_S = 120.0
P, D = "gpu/0", "gpu/1"
OTHER_KEY = "sk-other-6f1c2a9b8d7e4f31"
PRICE = {"input": 1.0, "cached_input": 0.1, "output": 4.0}
LONG = "The ledger keeps one row for each request, and the spillway opens when there is too much water. " * 12
LONGER = (
    LONG + "And then there is so much more of it that nobody who was here before has ever seen as much. " * 12
)
# What needs every prompt token where it is answered is never computed elsewhere.
ALONE = {"use_beam_search": False}
SPEC = {
    "model": str(MODELS / "tiny"),
    "gpus": "none",
    # vLLM's own repair (`recompute`) would hide the gateway's.
    "roles": {"prefill": 1, "decode": 1, "load_failure": "fail", "options": {"kv_buffer_device": "cpu"}},
    "command": [str(PYTHON), "-m", "vllm.entrypoints.launchers.api_server.entry"],
    "max_model_len": 4096,
    "kv_cache_memory_bytes": 64 << 20,
    "prefix_caching": {"block_size": 32},
    "env": {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    "shutdown_timeout_s": 1,
    # A new engine is slow to come here, and not what is tested.
    "supervision": STAYS_DEAD,
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    models = {"tiny": {"targets": [{"pool": "gpu", "model": "tiny"}], "price": PRICE}}
    keys = [{"name": "other", "key": OTHER_KEY, "team": "others"}]
    running = EnginePool(tmp_path_factory.mktemp("apart"), SPEC, models=models, keys=keys)
    running.config["pools"]["gpu"]["prefill"] = {"least_tokens": 100, "timeout_s": WAIT_S}
    running.start()
    try:
        running.wait_ready(START_S)
        yield running
        assert running.stop(90) == 0
    finally:
        running.kill()
    assert "Traceback" not in running.log(), running.log()[-8000:]


@pytest.fixture(scope="module")
def client(gateway: EnginePool) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=300) as sdk:
        yield sdk


def ask(client: Any, text: str, session: str, **fields: Any) -> Any:
    """Of an asynchronous SDK, to be awaited."""
    given = {"max_tokens": 16, "temperature": 0, **fields}
    headers = {"x-session-affinity": session}
    return client.chat.completions.with_raw_response.create(
        model="tiny", messages=user(text), extra_headers=headers, **given
    )


def figure(gateway: EnginePool, engine: str, name: str) -> float:
    """Of the engine's own metrics page, the sum of a series by the beginning of its name and labels."""
    port = gateway.engines()[engine]["port"]
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = [line.rsplit(" ", 1) for line in lines if line.startswith("vllm:")]
    return sum(float(value) for series, value in found if all(part in series for part in name.split()))


def until_nothing_is_held(gateway: EnginePool) -> None:
    """Long before the lease of half a minute ends."""
    gateway.wait(lambda: figure(gateway, P, "kv_cache_usage_perc") == 0.0, 20.0)


def test_the_text_is_that_of_one_engine_and_the_answering_one_computes_nothing_of_the_prompt(client, gateway):
    computed = "prompt_tokens_by_source_total{ local_compute"
    before = figure(gateway, D, computed)
    apart = ask(client, LONG, "one")
    row = gateway.row(apart.headers["x-request-id"], within_s=60)
    assert apart.headers["x-headgate-prefill"] == row["prefill_endpoint"] == P
    assert (row["endpoint"], row["attempts"], row["failed_attempts"]) == (D, 1, "[]")
    assert figure(gateway, D, computed) == before
    assert figure(gateway, D, "prompt_tokens_by_source_total{ external_kv_transfer") == row["input_tokens"]
    alone = ask(client, LONG, "two", extra_body={**ALONE, "cache_salt": "alone"})
    assert "x-headgate-prefill" not in alone.headers
    said, told = apart.parse(), alone.parse()
    assert said.choices[0].message.content == told.choices[0].message.content
    assert said.usage.prompt_tokens == told.usage.prompt_tokens
    assert figure(gateway, D, computed) > before
    until_nothing_is_held(gateway)


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_billed_from_the_decode_answer(client, gateway, stream):
    """The first engine has computed the beginning already, the second one knows nothing of it under this salt."""
    salted = {"extra_body": {"cache_salt": f"billed-{stream}"}}
    ask(client, LONG, f"begin-{stream}", **salted)
    raw = ask(client, LONGER, f"other-{stream}", stream=stream, **salted)
    text = "".join(c.delta.content or "" for e in raw.parse() for c in e.choices) if stream else ""
    row = gateway.row(raw.headers["x-request-id"], within_s=60)
    assert row["prefill_endpoint"] == P
    assert row["cache_read_tokens"] >= 224  # full blocks of 32
    assert row["cost_nanousd"] == (
        row["input_tokens"] * 1000 + row["cache_read_tokens"] * 100 + row["output_tokens"] * 4000
    )
    assert (row["is_estimated"], row["output_tokens"]) == (0, 16)
    if stream:
        alone = ask(client, LONGER, "x", extra_body={**ALONE, "cache_salt": "whole"}).parse()
        assert text == alone.choices[0].message.content
    until_nothing_is_held(gateway)


def test_tenants_with_the_same_prompt_share_no_cache(client, gateway):
    """A pool of vLLM is salted by itself; a client's own salt is not the whole of it."""
    with openai.OpenAI(base_url=gateway.base_url, api_key=OTHER_KEY, max_retries=0, timeout=300) as other:
        cached = []
        for sdk in (client, client, other, other):
            raw = ask(sdk, "shared " + LONG, "same", extra_body={**ALONE, "cache_salt": "guessed"})
            row = gateway.row(raw.headers["x-request-id"], within_s=60)
            assert row["cost_nanousd"] == (
                row["input_tokens"] * 1000 + row["cache_read_tokens"] * 100 + row["output_tokens"] * 4000
            )
            cached.append(row["cache_read_tokens"])
    assert cached[0] == cached[2] == 0
    assert cached[1] == cached[3] > 0


async def test_a_client_that_leaves_between_the_calls_leaves_nothing_held(gateway):
    stopped = gateway.main_process(D)
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0) as sdk:
        os.kill(stopped, signal.SIGSTOP)
        try:
            call = asyncio.ensure_future(ask(sdk, "left " + LONG, "left"))
            await gateway.until(lambda: figure(gateway, P, "kv_cache_usage_perc") > 0.0, WAIT_S)
            await asyncio.sleep(1.0)  # the second call is on its way to one that does not read
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        finally:
            os.kill(stopped, signal.SIGCONT)
    await asyncio.to_thread(until_nothing_is_held, gateway)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_that_computed_is_killed_between_the_calls_and_the_request_succeeds(gateway, stream):
    """The first time it dies; the second time it has been computed by nobody, and is answered all the same."""
    async with openai.AsyncOpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=300) as sdk:
        if gateway.engines()[P]["state"] != "ready":
            raw = await ask(sdk, f"nobody {LONG}", "nobody", stream=stream)
            assert "x-headgate-prefill" not in raw.headers
            return
        stopped = gateway.main_process(D)
        os.kill(stopped, signal.SIGSTOP)
        try:
            call = asyncio.ensure_future(ask(sdk, f"killed {stream} {LONG}", "killed", stream=stream))
            await gateway.until(lambda: figure(gateway, P, "kv_cache_usage_perc") > 0.0, WAIT_S)
            for process in gateway.processes(P)[1:]:
                os.kill(process.pid, signal.SIGKILL)
        finally:
            os.kill(stopped, signal.SIGCONT)
        raw = await call
    row = await asyncio.to_thread(gateway.row, raw.headers["x-request-id"], 60)
    assert (row["ended"], row["status"], row["endpoint"]) == ("completed", 200, D)
    assert (row["attempts"], row["prefill_endpoint"], row["output_tokens"]) == (2, "", 16)
    reasons = [tuple(each[:2]) for each in json.loads(row["failed_attempts"])]
    assert sorted(reasons) == [(P, "unused"), (D, "500")]
