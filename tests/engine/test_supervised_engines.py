"""Real vLLM under the supervisor: replaced, killed and orphaned while clients are at work."""

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator

import openai
import pytest

from tests.engine.pools import MODELS, PYTHON, Engine, session_at
from tests.support.engine_pool import (
    EnginePool,
    a_load,
    any_alive,
    everything_of,
    failed,
    kill,
)
from tests.support.gateway_process import KEY
from tests.support.load import MODEL
from tests.support.rawcli import RawClient

pytestmark = pytest.mark.engine

START_S = 400.0  # of two engines at once, on two busy cores
# Short answers, for which clients wait as long as two busy cores take.
LOAD = {"clients": 4, "max_tokens": 24, "patience_s": 300.0}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
SPEC = {
    "model": str(MODELS / "tiny"),
    "gpus": "none",
    "replicas": 2,
    "command": [str(PYTHON), "-m", "vllm.entrypoints.launchers.api_server.entry"],
    "max_model_len": 16384,
    "kv_cache_memory_bytes": 256 << 20,
    "prefix_caching": {"block_size": 32},
    "env": {"HF_HUB_OFFLINE": "1"},
    "supervision": {"look_every_s": 1.0, "backoff_s": 0.2},
}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    running = EnginePool(tmp_path_factory.mktemp("supervised"), SPEC)
    running.start()
    try:
        running.wait_ready(START_S)
        yield running
        everything = everything_of(running)
        assert running.stop() == 0
        assert not any_alive(everything), "an engine outlived the service"
    finally:
        running.kill()
    assert "Traceback" not in running.log(), running.log()[-8000:]


@pytest.mark.parametrize("which", ["main", "core"])
async def test_a_killed_engine_costs_only_streams_it_had_begun_and_comes_back_without_help(gateway, which):
    await gateway.until(lambda: gateway.states() == ["ready", "ready"], START_S)
    load = a_load(gateway, seed=2, **LOAD)
    try:
        await gateway.until(lambda: len(load.calls) > 30, START_S)
        before = gateway.engines()["gpu/0"]
        victims = set(gateway.processes("gpu/0"))
        killed_at = time.perf_counter()
        kill(gateway.main_process("gpu/0") if which == "main" else Engine(gateway, "gpu/0").core())
        await gateway.until(lambda: gateway.engines()["gpu/0"]["pid"] not in (None, before["pid"]), START_S)
        await gateway.until(lambda: gateway.states() == ["ready", "ready"], START_S)
        back_s = time.perf_counter() - killed_at
        back_at = len(load.calls)
        await gateway.until(lambda: len(load.calls) > back_at + 20, START_S)
    finally:
        await load.stop()
    broken = failed(load.calls)
    print(
        f"killed {which}: {len(load.calls)} requests, {len(broken)} cut, back after {back_s:.0f} s: {broken}"
    )
    assert all("stream" in one for one in broken), broken
    assert len(broken) <= 4, "no more than the clients there are"
    assert not any_alive(victims), "what the killed process had started is still there"
    assert gateway.engines()["gpu/0"]["restarts"] == before["restarts"] + 1
    assert gateway.engines()["gpu/0"]["cause"]


async def test_a_rolling_restart_at_steady_load_fails_no_request(gateway):
    await gateway.until(lambda: gateway.states() == ["ready", "ready"], START_S)
    before = {name: replica["pid"] for name, replica in gateway.engines().items()}
    load = a_load(gateway, seed=3, **LOAD)
    try:
        await gateway.until(lambda: len(load.calls) > 30, START_S)
        gateway.act("restart")
        await gateway.until(lambda: not gateway.pool()["change"], 2 * START_S)
    finally:
        await load.stop()
    after = {name: replica["pid"] for name, replica in gateway.engines().items()}
    print(f"rolling restart: {len(load.calls)} requests, failed: {failed(load.calls)}")
    assert not failed(load.calls)
    assert all(before[name] != after[name] for name in before)
    assert not gateway.pool()["problem"]


async def test_an_engine_that_somebody_else_told_to_end_refuses_what_another_then_answers(gateway):
    """vLLM finishes what it has, says 200 on `/health`, and 500 to everything new."""
    await gateway.until(lambda: gateway.states() == ["ready", "ready"], START_S)
    with openai.OpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=START_S) as sdk:
        session = await asyncio.to_thread(session_at, gateway, sdk, "gpu/0", MODEL)
    long = {**CHAT, "stream": True, "max_tokens": 4000, "ignore_eos": True}
    stream = await RawClient.connect(gateway.port, timeout_s=60)
    await stream.send(request_bytes(long, session))
    await gateway.until(lambda: gateway.metrics().get('headgate_requests_in_flight{endpoint="gpu/0"}') == 1)
    before = gateway.engines()["gpu/0"]["pid"]
    os.kill(gateway.main_process("gpu/0"), signal.SIGTERM)
    answers = []
    for _ in range(20):
        answers.append(
            await asyncio.to_thread(gateway.post, "/v1/chat/completions", CHAT, {"x-session-id": session})
        )
        if answers[-1][1].get("x-headgate-attempts") == "2":
            break
    stream.close()
    told = [
        (status, headers.get("x-headgate-attempts"), headers.get("x-headgate-target"))
        for status, headers, _ in answers
    ]
    print(f"while it ended: {told}")
    assert {status for status, *_ in told} == {200}
    assert told[-1] == (200, "2", "gpu/1")
    await gateway.until(lambda: gateway.engines()["gpu/0"]["pid"] not in (None, before), START_S)
    await gateway.until(lambda: gateway.states() == ["ready", "ready"], START_S)


def request_bytes(body: dict[str, object], session: str) -> bytes:
    content = json.dumps(body).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer %b\r\nx-session-id: %b\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    ) % (KEY.encode(), session.encode(), len(content), content)


def test_engines_of_a_killed_gateway_serve_the_next_one_and_end_without_any(gateway):
    gateway.wait(lambda: gateway.states() == ["ready", "ready"], START_S)
    engines = everything_of(gateway)
    gateway.kill()
    assert len(any_alive(engines)) == len(engines)
    began_at = time.perf_counter()
    gateway.start()
    gateway.wait(lambda: gateway.states() == ["ready", "ready"], START_S)
    print(f"taken over after {time.perf_counter() - began_at:.1f} s, the gateway's own start included")
    assert everything_of(gateway) == engines
    assert gateway.post("/v1/chat/completions", CHAT)[0] == 200


def test_a_start_that_fails_says_why(tmp_path):
    """vLLM's own words, through the supervisor to the operator."""
    flag = SPEC | {"replicas": 1, "extra_args": ["--no-such-flag", "3"]}
    small = SPEC | {"replicas": 1, "kv_cache_memory_bytes": 65536}
    with EnginePool(tmp_path, flag, more_pools={"small": {"vllm": small}}) as gateway:
        gateway.wait(lambda: all(engine["cause"] for engine in gateway.engines().values()), START_S)
        assert "unrecognized arguments: --no-such-flag" in gateway.engines()["gpu/0"]["cause"]
        assert "the KV cache holds less than one sequence" in gateway.engines()["small/0"]["cause"]
