"""Probes, scrapes and words between workers, with real engines: who is out, how it comes back, what is seen of it."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.gateway_process import OPERATOR_KEY, ROOT, Gateway
from tests.support.simulator_process import SimulatorProcess

pytestmark = pytest.mark.e2e

QUICK = {
    "eject_s": 0.5,
    "slow_start_s": 0.2,
    "probe_every_s": 0.1,
    "probe_timeout_s": 10,
    "scrape_every_s": 0.1,
}
_numbers = itertools.count()


@pytest.fixture
def engines() -> Iterator[list[SimulatorProcess]]:
    with SimulatorProcess(allow_faults=True) as first, SimulatorProcess(allow_faults=True) as second:
        yield [first, second]


def a_gateway(directory, engines, **health: Any) -> Gateway:
    return Gateway(
        directory,
        workers=2,
        pools={
            "gpu": {
                "type": "simulator",
                "endpoints": [f"{engine.url}/v1" for engine in engines],
                "health": {**QUICK, **health},
            }
        },
        models={"m": {"targets": [{"pool": "gpu", "model": "demo"}], "price": {"input": 1, "output": 1}}},
        logging={"access": False},
    )


def endpoints(gateway: Gateway) -> dict[str, dict[str, Any]]:
    return {endpoint["name"]: endpoint for endpoint in gateway.manage("/api/status")["endpoints"]}


def until(gateway: Gateway, condition: Any, what: str, within_s: float = 60.0) -> dict[str, dict[str, Any]]:
    deadline = time.monotonic() + within_s
    while not condition(seen := endpoints(gateway)):
        assert time.monotonic() < deadline, f"not {what}: {seen}\n{gateway.log()[-2000:]}"
        time.sleep(0.05)
    return seen


def chat(gateway: Gateway, **fields: Any) -> tuple[int, str]:
    """Each begins a conversation of its own, so that they go to both engines."""
    content = f"conversation {next(_numbers)}"
    body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": content}], **fields}
    status, headers, _ = gateway.post("/v1/chat/completions", body)
    return status, headers.get("x-headgate-target", "")


def test_11_the_engines_own_figures_are_seen_with_their_age_and_grow_old(tmp_path, engines):
    with a_gateway(tmp_path, engines) as gateway:
        seen = until(gateway, lambda e: all(x["load_age_s"] is not None for x in e.values()), "scraped")
        assert {(e["running"], e["waiting"]) for e in seen.values()} == {(0, 0)}
        engines[0].process.send_signal(signal.SIGSTOP)
        try:
            until(gateway, lambda e: e["gpu/0"]["load_age_s"] > 0.5 > e["gpu/1"]["load_age_s"], "stale")
        finally:
            engines[0].process.send_signal(signal.SIGCONT)


def test_18_a_dead_engine_is_out_before_any_request_finds_out_and_its_successor_is_taken_back(
    tmp_path, engines
):
    with a_gateway(tmp_path, engines) as gateway:
        until(gateway, lambda e: e["gpu/0"]["load_age_s"] is not None, "scraped")
        port = engines[0].port
        engines[0].process.kill()
        engines[0].process.wait()
        seen = until(gateway, lambda e: e["gpu/0"]["out_in_workers"] == 2, "out in both workers")
        assert seen["gpu/0"]["reason"] == "connect"
        assert {chat(gateway) for _ in range(10)} == {(200, "gpu/1")}
        assert gateway.metrics()['headgate_endpoint_out{endpoint="gpu/0"}'] == 2
        with SimulatorProcess(port=port):
            until(gateway, lambda e: e["gpu/0"]["state"] == "up", "back")
            assert gateway.metrics()['headgate_probes_total{endpoint="gpu/0",result="bad"}'] > 0


def test_20_what_one_worker_learns_the_others_know_and_so_does_a_new_one(tmp_path, engines):
    with a_gateway(tmp_path, engines, eject_s=60) as gateway:
        engines[0].fault("status=500")
        deadline = time.monotonic() + 40
        while endpoints(gateway)["gpu/0"]["state"] == "up":
            assert time.monotonic() < deadline, "never out"
            assert chat(gateway)[0] in (200, 500)
        until(gateway, lambda e: e["gpu/0"]["out_in_workers"] == 2, "out in both workers")
        ejections = 'headgate_endpoint_ejections_total{endpoint="gpu/0",reason="500"}'
        assert gateway.metrics()[ejections] == 1  # the other worker believed it
        workers = gateway.manage("/api/status")["workers"]
        os.kill(workers[0]["pid"], signal.SIGKILL)
        deadline = time.monotonic() + 30
        while {
            worker["name"]
            for worker in gateway.manage("/api/status")["workers"]
            if worker["state"] == "ready"
        } <= {worker["name"] for worker in workers}:
            assert time.monotonic() < deadline, "no new worker"
            time.sleep(0.1)
        until(gateway, lambda e: e["gpu/0"]["out_in_workers"] == 2, "known to the new worker")


def test_20_health_survives_a_new_configuration(tmp_path, engines):
    with a_gateway(tmp_path, engines, eject_s=60) as gateway:
        engines[0].fault("status=500")
        while endpoints(gateway)["gpu/0"]["state"] == "up":
            chat(gateway)
        pool = gateway.config["pools"]["gpu"]
        pool["endpoints"] = list(reversed(pool["endpoints"]))
        pool["headers"] = {"x-department": "research"}  # another setting of the address itself
        gateway.write_config()
        gateway.wait_log("Headgate is ready", within_s=60)  # until then it refuses to reload
        assert gateway.manage("/api/reload", "POST")["applied"]
        assert {chat(gateway) for _ in range(10)} == {(200, "gpu/0")}  # which is the other one by now


def test_a_slow_engine_is_compared_with_a_well_one_before_it_is_taken_back(tmp_path):
    pace = {
        "time_scale": 1,
        "prefill_overhead_us": 20_000,
        "decode_us_per_token": 2_000,
        "allow_faults": True,
    }
    with SimulatorProcess(**pace) as first, SimulatorProcess(**pace) as second:
        engines = [first, second]
        with a_gateway(tmp_path, engines, scrape="none") as gateway:
            for _ in range(60):
                assert chat(gateway)[0] == 200
            first.post("/sim/condition", json.dumps({"slowness": 20.0}).encode())
            deadline = time.monotonic() + 30
            while (seen := endpoints(gateway)["gpu/0"])["state"] == "up":
                assert time.monotonic() < deadline, seen
                chat(gateway)
            assert seen["reason"] == "slow"
            until(gateway, lambda e: e["gpu/0"]["last_probe"] == "slow", "found to be slow by a probe")
            first.post("/sim/condition", json.dumps({"slowness": 1.0}).encode())
            until(gateway, lambda e: e["gpu/0"]["state"] == "up", "back")


def test_the_command_shows_what_operators_want_to_know(tmp_path, engines):
    with a_gateway(tmp_path, engines) as gateway:
        until(gateway, lambda e: e["gpu/1"]["load_age_s"] is not None, "scraped")
        engines[0].process.kill()
        until(gateway, lambda e: e["gpu/0"]["state"] == "out", "out")
        url = f"http://127.0.0.1:{gateway.management_port}"
        shown = command("--config", str(gateway.directory / "config.yaml"))
        assert shown.returncode == 0, shown.stderr
        assert "Left out: gpu/0." in shown.stdout
        assert "127.0.0.1" not in shown.stdout
        assert json.loads(command("--url", url, "--json").stdout)["endpoints"][0]["reason"] == "connect"
        refused = command("--url", url, "--key", "no")
        assert (refused.returncode, "Traceback" in refused.stderr) == (1, False)
    nobody = command("--url", url)
    assert nobody.returncode == 1
    assert "Is it running?" in nobody.stderr


def command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", "status", *options],
        check=False,
        cwd=ROOT,
        env={**os.environ, "HEADGATE_OPERATOR_KEY": OPERATOR_KEY},
        capture_output=True,
        text=True,
        timeout=60,
    )
