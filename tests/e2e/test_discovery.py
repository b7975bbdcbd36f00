"""Endpoints that come and go by name and in a file, with real engines behind them and requests all the while."""

import time
from typing import Any

import pytest

from tests.support.gateway_process import Gateway
from tests.support.name_server import NameServer
from tests.support.simulator_process import SimulatorProcess

pytestmark = pytest.mark.e2e

QUIET = {"probe": "none", "scrape": "none"}


def a_gateway(directory: Any, discovery: dict[str, Any]) -> Gateway:
    pool = {"type": "simulator", "discovery": {**discovery, "every_s": 0.1}, "health": QUIET}
    models = {"m": {"targets": [{"pool": "gpu", "model": "demo", "deadlines": {"idle_s": 60}}]}}
    return Gateway(directory, workers=2, pools={"gpu": pool}, models=models, logging={"access": False})


def chat(gateway: Gateway, session: str = "") -> tuple[int, dict[str, str]]:
    body = {"model": "m", "max_tokens": 2, "messages": [{"role": "user", "content": f"hello {session}"}]}
    headers = {"x-session-affinity": session} if session else {}
    status, told, _ = gateway.post("/v1/chat/completions", body, headers)
    return status, told


def names(gateway: Gateway) -> set[str]:
    return {endpoint["name"] for endpoint in gateway.manage("/api/status")["endpoints"]}


def until(is_so: Any, what: str) -> None:
    deadline = time.monotonic() + 40
    while not is_so():
        assert time.monotonic() < deadline, f"not {what}"
        time.sleep(0.05)


def test_services_of_a_name_are_found_join_and_leave_and_sessions_stay(tmp_path):
    name = "_http._tcp.engines.test"
    dns = {"name": name, "records": "srv"}
    with NameServer() as server, SimulatorProcess() as first, SimulatorProcess(seed=1) as second:

        def serve(*engines: SimulatorProcess) -> None:
            server.records = {(f"e{engine.port}.test", "A"): ["127.0.0.1"] for engine in engines} | {
                (name, "SRV"): [(0, 1, engine.port, f"e{engine.port}.test") for engine in engines]
            }

        serve(first)
        with a_gateway(tmp_path, {"dns": {**dns, "nameserver": server.name}}) as gateway:
            (only,) = names(gateway)
            assert "127.0" not in only
            assert chat(gateway, "s")[1]["x-headgate-target"] == only
            serve(first, second)
            until(lambda: len(names(gateway)) == 2, "joined")
            assert only in names(gateway)
            targets = {chat(gateway, f"s{n}")[1]["x-headgate-target"] for n in range(16)}
            assert targets == names(gateway)
            homes = {n: chat(gateway, f"s{n}")[1]["x-headgate-target"] for n in range(8)}
            serve(second)
            until(lambda: only not in names(gateway), "left")
            (left,) = names(gateway)
            assert {chat(gateway, f"s{n}")[1]["x-headgate-target"] for n in range(8)} == {left}
            serve(second, first)
            until(lambda: len(names(gateway)) == 2, "joined again")
            assert {n: chat(gateway, f"s{n}")[1]["x-headgate-target"] for n in range(8)} == homes
            server.is_silent = True  # what is known stays
            gateway.wait_log("endpoints cannot be looked up", within_s=40)
            assert chat(gateway)[0] == 200


def test_a_file_is_followed_and_a_pool_of_nobody_says_so(tmp_path):
    path = tmp_path / "engines.yaml"
    path.write_text("# nobody yet\n")
    with SimulatorProcess() as engine, a_gateway(tmp_path, {"file": {"path": str(path)}}) as gateway:
        status, told = chat(gateway)
        assert status == 503
        assert "retry-after" in {name.lower() for name in told}
        path.write_text(f"- {{url: '{engine.url}/v1', name: big}}\n")
        # A worker that is only just starting hears of it a moment later.
        until(lambda: chat(gateway)[1].get("x-headgate-target") == "gpu/big", "found by all")
        path.write_text("- {url: nonsense}\n")
        gateway.wait_log("entry 1 of the file", within_s=40)
        assert chat(gateway)[0] == 200
