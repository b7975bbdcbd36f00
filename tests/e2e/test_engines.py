"""Pools of engines that Headgate runs, as clients and operators see them. The engines are the stand-in for vLLM."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from gateway.commands.app import app
from local_engine.free_ports import FreePorts
from tests.support.engine_pool import (
    PRICE,
    EnginePool,
    a_load,
    any_alive,
    everything_of,
    failed,
    fake_spec,
    is_alive,
    kill,
)
from tests.support.gateway_process import KEY, OPERATOR_KEY, ROOT
from tests.support.load import MODEL

pytestmark = pytest.mark.e2e

LOGS = ROOT / "tests/local_engine/start_logs"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePool]:
    """Three slots, two of which run; a pool that does not start, and one that is used now and then."""
    spec = fake_spec(scale={"min": 0, "max": 3, "down_after_s": 3600})
    broken = fake_spec(replicas=1, env={"FAKE_VLLM_FAULT": f"exit:{LOGS / 'missing_weights.log'}"})
    seldom = fake_spec(
        replicas=1,
        scale={"min": 0, "max": 2, "waiting": 1, "up_after_s": 0, "zero_after_s": 8},
        extra_args=["--time-scale", "1"],
    )
    more = {
        "broken": {"vllm": broken},
        "seldom": {"vllm": seldom, "placement": {"max_in_flight": 1}},
    }
    models = {
        MODEL: {"targets": [{"pool": "gpu", "model": "org/tiny"}], "price": PRICE},
        "seldom": {"targets": [{"pool": "seldom", "model": "org/tiny"}], "price": PRICE},
    }
    directory = tmp_path_factory.mktemp("gateway")
    # Requests wait as long as a start takes, which on a busy machine is long.
    patience = {"default": {"wait_s": 90}}
    with EnginePool(
        directory, spec, more_pools=more, models=models, overload=patience, queue={"enabled": True}
    ) as running:
        running.wait(lambda: running.states() == ["ready", "ready", "planned"])
        yield running
        everything = everything_of(running)
        assert running.stop() == 0
        assert not any_alive(everything), "an engine outlived the service"
    assert "Traceback" not in running.log(), running.log()[-8000:]


@pytest.fixture
def two_ready(gateway: EnginePool) -> Iterator[EnginePool]:
    """The same before and after every test."""
    gateway.wait(lambda: gateway.states() == ["ready", "ready", "planned"])
    yield gateway
    gateway.act("scale", replicas=2)
    gateway.wait(lambda: gateway.states() == ["ready", "ready", "planned"])


def headgate(gateway: EnginePool, *arguments: str) -> str:
    """The command's standard output."""
    environment = {
        "HEADGATE_MANAGEMENT_URL": f"http://127.0.0.1:{gateway.management_port}",
        "HEADGATE_OPERATOR_KEY": OPERATOR_KEY,
        "COLUMNS": "200",
    }
    result = CliRunner().invoke(app, ["engine", *arguments], env=environment)
    assert result.exit_code == 0, result.output
    return result.output


async def test_replacing_engines_by_command_and_by_another_specification_fails_no_request(two_ready):
    """The second time they also listen elsewhere: every worker gets the new addresses, one after another."""
    gateway = two_ready
    first = pids(gateway)
    load = a_load(gateway)
    try:
        headgate(gateway, "restart", "gpu")
        await gateway.until(lambda: not gateway.pool()["change"])
        second = pids(gateway)
        gateway.config["pools"]["gpu"]["vllm"]["port"] = three_ports()
        gateway.write_config()
        assert gateway.manage("/api/reload", "POST")["applied"]
        await gateway.until(lambda: not gateway.pool()["change"])
    finally:
        await load.stop()
    third = pids(gateway)
    assert not set(first) & set(second)
    assert not set(second) & set(third)
    assert not failed(load.calls)
    assert len(load.calls) > 20, "too little load to show anything"
    rows = gateway.rows(len(load.calls))
    attempts = {row["attempts"] for row in rows if str(row["endpoint"]).startswith("gpu/")}
    assert attempts == {1}, "not even a retry was needed"


def pids(gateway: EnginePool) -> list[int]:
    return [gateway.engines()[name]["pid"] for name in ("gpu/0", "gpu/1")]


def three_ports() -> int:
    """The first of three in a row that are free, below those that the kernel gives out."""
    return FreePorts(range(12000, 17000)).take("test", 3, "127.0.0.1")


async def test_a_killed_engine_costs_only_streams_it_had_begun_and_comes_back_without_help(two_ready):
    gateway = two_ready
    load = a_load(gateway)
    try:
        await gateway.until(lambda: len(load.calls) > 20)
        victims = gateway.processes("gpu/0")
        kill(gateway.main_process("gpu/0"))
        await gateway.until(lambda: gateway.engines()["gpu/0"]["pid"] not in (None, victims[0].pid))
        await gateway.until(lambda: gateway.states()[:2] == ["ready", "ready"])
        back_at = len(load.calls)
        await gateway.until(lambda: len(load.calls) > back_at + 20)
    finally:
        await load.stop()
    broken = failed(load.calls)
    assert all("stream" in one for one in broken), broken
    assert len(broken) <= 6, "no more than the clients there are"
    assert not any_alive(set(victims)), "what the killed process had started is still there"
    replica = gateway.engines()["gpu/0"]
    assert replica["restarts"] >= 1
    assert "killed (SIGKILL)" in replica["cause"]
    assert gateway.metrics()['headgate_engine_failures_total{cause="killed",engine="gpu/0",kind="died"}'] >= 1


def test_a_replica_that_is_drained_gets_nothing_until_it_is_resumed(two_ready):
    gateway = two_ready
    headgate(gateway, "drain", "gpu/0")
    gateway.wait(lambda: gateway.engines()["gpu/0"]["state"] == "draining")
    assert {gateway.post("/v1/chat/completions", CHAT)[1]["x-headgate-target"] for _ in range(6)} == {"gpu/1"}
    assert is_alive(gateway.engines()["gpu/0"]["pid"])
    headgate(gateway, "resume", "gpu")
    gateway.wait(lambda: gateway.engines()["gpu/0"]["state"] == "ready")


def test_a_pool_grows_and_shrinks_by_command(two_ready):
    gateway = two_ready
    headgate(gateway, "scale", "gpu", "3")
    gateway.wait(lambda: gateway.states() == ["ready"] * 3)
    headgate(gateway, "scale", "gpu", "1")
    gateway.wait(lambda: gateway.states() == ["ready", "planned", "planned"])
    assert gateway.post("/v1/chat/completions", CHAT)[0] == 200
    with pytest.raises(urllib.error.HTTPError) as caught:
        gateway.act("scale", replicas=4)
    with caught.value as refused:
        assert refused.code == 409
        assert "raise vllm.replicas or scale.max" in json.loads(refused.read())["error"]["message"]


def test_the_status_is_a_table_for_people_and_json_for_programs(two_ready):
    gateway = two_ready
    table = headgate(gateway, "status")
    assert "gpu/0" in table
    assert "gpu: 2 of 2 wanted are ready." in table
    told = json.loads(headgate(gateway, "status", "--json"))
    assert [replica["state"] for replica in told["pools"][0]["replicas"]] == ["ready", "ready", "planned"]
    assert gateway.metrics()['headgate_engine_state{engine="gpu/1",state="ready"}'] == 1
    assert "VLLM_API_KEY" not in json.dumps(told)


def test_an_engine_that_cannot_start_says_why_and_a_reload_cures_it(two_ready):
    gateway = two_ready
    gateway.wait(lambda: gateway.states("broken") == ["crash_looped"])
    cause = gateway.engines()["broken/0"]["cause"]
    assert "Cannot find any model weights with `/models/noweights`" in cause
    assert "the model is not there" in headgate(gateway, "status")
    gateway.wait_log("an engine is given up until it is told to try again")
    before = {name: replica["pid"] for name, replica in gateway.engines().items()}
    del gateway.config["pools"]["broken"]["vllm"]["env"]["FAKE_VLLM_FAULT"]
    gateway.write_config()
    assert gateway.manage("/api/reload", "POST")["applied"]
    gateway.wait(lambda: gateway.states("broken") == ["ready"])
    after = {name: replica["pid"] for name, replica in gateway.engines().items()}
    assert {name for name in after if after[name] != before[name]} == {"broken/0"}


def test_a_pool_nobody_uses_goes_to_zero_and_requests_wake_it_unless_the_operator_has_switched_it_off(
    gateway,
):
    gateway.wait(lambda: gateway.states("seldom") == ["planned"] * 2 and gateway.pool("seldom")["is_asleep"])
    assert "asleep until it is asked for" in headgate(gateway, "status")
    # Two seconds each, and each worker has one under way: there is a queue for three looks of the scaler.
    long = {**CHAT, "model": "seldom", "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(8) as clients:
        answers = [clients.submit(gateway.post, "/v1/chat/completions", long) for _ in range(8)]
        gateway.wait(lambda: gateway.pool("seldom")["wanted"] == 2)
        assert [answer.result()[0] for answer in answers] == [200] * 8
    headgate(gateway, "scale", "seldom", "0")
    gateway.wait(lambda: gateway.states("seldom") == ["planned"] * 2)
    short = {**CHAT, "model": "seldom"}
    status, headers, body = gateway.post("/v1/chat/completions", short, {"x-headgate-on-full": "reject"})
    assert status == 429, body
    assert int(headers["retry-after"]) >= 1
    assert gateway.states("seldom") == ["planned"] * 2
    headgate(gateway, "wake", "seldom")
    gateway.wait(lambda: gateway.states("seldom")[0] == "ready")
    headgate(gateway, "sleep", "seldom")
    gateway.wait(lambda: gateway.states("seldom") == ["planned"] * 2)


def test_a_job_wakes_the_pool_that_it_waits_for(gateway):
    gateway.wait(lambda: gateway.states("seldom") == ["planned"] * 2 and gateway.pool("seldom")["is_asleep"])
    job = {"endpoint": "/v1/chat/completions", "body": {**CHAT, "model": "seldom"}}
    status, _, answer = gateway.post("/v1/jobs", job)
    assert status == 202, answer
    path = f"http://127.0.0.1:{gateway.port}/v1/jobs/{json.loads(answer)['id']}"
    request = urllib.request.Request(path, headers={"authorization": f"Bearer {KEY}"})
    found = {}

    def has_succeeded():
        with urllib.request.urlopen(request, timeout=30) as told:
            found.update(json.loads(told.read()))
        return found["status"] == "succeeded"

    gateway.wait(has_succeeded)
    assert found["attempts"] == 0, found  # it was sent to no engine that was not there
