"""Prefill on one simulator and decode on another, by vLLM's own protocol: params, leases, what comes back and when."""

import asyncio
import json
import time

import openai
import pytest

from tests.support.simulator_process import SimulatorProcess

LONG = "The ledger keeps one row for each request, and the spillway opens when there is too much water. " * 8
FAILS = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
RECOMPUTES = json.dumps({"kv_connector": "NixlConnector", "kv_load_failure_policy": "recompute"})
SHORT_LEASE = json.dumps(
    {"kv_connector": "NixlConnector", "kv_connector_extra_config": {"kv_lease_duration": 0.2}}
)


@pytest.fixture(scope="module")
def engines():
    """The one that prefills, and the one that decodes."""
    with (
        SimulatorProcess(kv_transfer_config=FAILS) as prefill,
        SimulatorProcess(kv_transfer_config=FAILS, allow_faults=True) as decode,
    ):
        yield prefill, decode


def ask(engine, text, params=None, **fields):
    with openai.OpenAI(base_url=f"{engine.url}/v1", api_key="-", max_retries=0, timeout=60) as sdk:
        extra = {} if params is None else {"kv_transfer_params": params}
        answer = sdk.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": text}], extra_body=extra, **fields
        )
        return list(answer) if fields.get("stream") else answer  # read before the connection is closed


def prefill(engine, text):
    answer = ask(engine, text, {"do_remote_decode": True}, max_tokens=1)
    return answer.model_extra["kv_transfer_params"]


def until(is_so, within_s=30.0):
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def held(engine):
    return engine.metrics()["kv_cache_usage_perc"]


def test_the_decoded_text_is_that_of_one_engine_and_nothing_of_the_prompt_is_computed_again(engines):
    first, second = engines
    alone = ask(first, "alone" + LONG)
    before = second.metrics()['prompt_tokens_by_source_total{source="local_compute"}']
    params = prefill(first, "apart" + LONG)
    assert held(first) > 0  # until somebody collects it
    apart = ask(second, "apart" + LONG, params)
    assert apart.choices[0].message.content == ask(first, "apart" + LONG).choices[0].message.content
    assert apart.usage.prompt_tokens == params["remote_num_tokens"] == alone.usage.prompt_tokens
    assert second.metrics()['prompt_tokens_by_source_total{source="local_compute"}'] == before
    until(lambda: held(first) == 0)


def test_the_decode_answer_tells_what_was_cached_where_the_prompt_was_computed(engines):
    first, second = engines
    text = "twice" + LONG
    fresh = ask(second, text, prefill(first, text)).usage.prompt_tokens_details
    assert fresh.cached_tokens == 0
    params = prefill(first, text + "and more of it " * 10)
    assert params["remote_prefill_cached_tokens"] > 100
    warm = ask(second, text + "and more of it " * 10, params).usage.prompt_tokens_details
    assert warm.cached_tokens == params["remote_prefill_cached_tokens"]


def test_a_refused_decode_gives_the_blocks_back(engines):
    first, second = engines
    params = prefill(first, "refused" + LONG)
    with pytest.raises(openai.BadRequestError):
        ask(second, "refused" + LONG, params, max_tokens=1_000_000)
    until(lambda: held(first) == 0)


async def test_a_decode_that_its_client_leaves_gives_the_blocks_back(engines):
    first, second = engines
    params = await asyncio.to_thread(prefill, first, "left" + LONG)
    await asyncio.to_thread(second.fault, "hang", 1)  # before it collects
    async with openai.AsyncOpenAI(base_url=f"{second.url}/v1", api_key="-", max_retries=0) as sdk:
        call = asyncio.ensure_future(
            sdk.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": "left" + LONG}],
                extra_body={"kv_transfer_params": params},
            )
        )
        await asyncio.sleep(0.2)
        assert held(first) > 0
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await asyncio.to_thread(until, lambda: held(first) == 0)


def test_what_is_collected_twice_or_is_another_prompts_fails_in_vllms_words(engines):
    first, second = engines
    params = prefill(first, "once" + LONG)
    ask(second, "once" + LONG, params)
    until(lambda: held(first) == 0)
    with pytest.raises(openai.InternalServerError, match="Internal server error"):
        ask(second, "once" + LONG, params)
    params = prefill(first, "mine" + LONG)
    with pytest.raises(openai.InternalServerError):
        ask(second, "yours" + LONG, params)
    until(lambda: held(first) == 0)


def test_a_lease_runs_out_and_its_blocks_are_free_again(engines):
    with SimulatorProcess(kv_transfer_config=SHORT_LEASE) as first:
        params = prefill(first, LONG)
        until(lambda: held(first) == 0)
        with pytest.raises(openai.InternalServerError):
            ask(engines[1], LONG, params)


def test_when_the_one_that_prefilled_is_gone_the_other_fails_or_computes_as_it_is_told(engines):
    with (
        SimulatorProcess(kv_transfer_config=FAILS, allow_faults=True) as first,
        SimulatorProcess(kv_transfer_config=RECOMPUTES) as second,
    ):
        first.fault("exit", 1)
        params = prefill(first, LONG)
        assert first.process.wait(30) != 0
        with pytest.raises(openai.InternalServerError):
            ask(engines[1], LONG, params)
        with pytest.raises(openai.APIError, match="Internal server error"):
            ask(engines[1], LONG, params, stream=True)
        assert ask(second, LONG, params).usage.prompt_tokens == params["remote_num_tokens"]


def test_without_a_connector_the_params_mean_nothing(engines):
    first, _ = engines
    with SimulatorProcess() as plain:
        assert ask(plain, LONG, {"do_remote_decode": True}).choices
        params = prefill(first, "nobody" + LONG)
        assert ask(plain, "nobody" + LONG, params).choices
