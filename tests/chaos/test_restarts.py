"""Restarts, reloads and drains while clients are at work: nobody is turned away, nothing is cut before its time."""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from tests.support.catalogue import answer_for
from tests.support.gateway_process import KEY, Gateway
from tests.support.journal_upstream import JournalUpstream
from tests.support.load import MODEL, QUICK, Call, Load, loaded_gateway
from tests.support.rawcli import RawClient
from tests.support.scripted_upstream import ScriptedUpstream

SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
REPLACED, RELOADED = "/api/restart", "/api/reload"
STREAM = answer_for("chat", {"model": "plain", "stream": True, "stream_options": {"include_usage": True}})

pytestmark = pytest.mark.chaos


@pytest.fixture
def upstream(tmp_path) -> Iterator[JournalUpstream]:
    print(f"HEADGATE_TEST_SEED={SEED}")
    with JournalUpstream(tmp_path / "upstream.journal") as running:
        yield running


def start_load(gateway: Gateway) -> list[Load]:
    """A mixture on connections kept and new, and clients that never leave theirs idle for long."""
    mixed = Load(gateway.port, 20, SEED, renewal=0.5)
    return [mixed, Load(gateway.port, 10, SEED + 1, kinds=QUICK, think_s=0.01, renewal=0.0)]


async def stop_load(loads: list[Load]) -> list[Call]:
    for load in loads:
        await load.stop()
    return [call for load in loads for call in load.calls]


def faults(calls: list[Call], gateway: Gateway, upstream: JournalUpstream) -> list[str]:
    """What went wrong, for clients or in the ledger."""
    begun = upstream.begun()
    rows = {row["request_id"]: row for row in gateway.rows(len(begun))}
    found = []
    for call in calls:
        row = rows.get(call.request_id)
        if call.outcome != "ok" or not call.looks_complete:
            connection = "a new" if call.is_new_connection else "a kept"
            found.append(
                f"{call.plan.serial}: {call.outcome}, status {call.status}, on {connection} connection"
            )
        elif row is None or (row["ended"], row["cost_nanousd"]) != ("completed", call.cost_nanousd):
            found.append(f"{call.plan.serial}: answered, but its row is {row}")
    if len(rows) != len(begun) or len(calls) != len(begun):
        found.append(
            f"{len(calls)} requests made, {len(begun)} seen by the upstream, {len(rows)} in the ledger"
        )
    return found


async def workers(gateway: Gateway) -> dict[str, str]:
    told = await asyncio.to_thread(gateway.manage, "/api/status")
    return {worker["name"]: worker["state"] for worker in told["workers"]}


async def until_ready(gateway: Gateway, *, without: set[str] = frozenset(), within_s: float = 60.0) -> None:
    """Two workers, and none of the old ones."""
    deadline = time.monotonic() + within_s
    while (now := await workers(gateway)).keys() & without or list(now.values()) != ["ready"] * 2:
        assert time.monotonic() < deadline, f"{now}\n{gateway.log()[-3000:]}"
        await asyncio.sleep(0.1)


async def test_rolling_restarts_are_noticed_by_nobody(tmp_path, upstream) -> None:
    with loaded_gateway(tmp_path, upstream.url) as gateway:
        await until_ready(gateway)
        loads = start_load(gateway)
        for _ in range(3):
            old = set(await workers(gateway))
            await asyncio.to_thread(gateway.manage, REPLACED, "POST")
            await until_ready(gateway, without=old)
        calls = await stop_load(loads)
        assert not (found := faults(calls, gateway, upstream)), "\n".join(found[:20])
        assert len(calls) > 300
        assert "Traceback" not in gateway.log()


async def test_reloads_are_noticed_by_nobody_and_a_bad_file_changes_nothing(tmp_path, upstream) -> None:
    with loaded_gateway(tmp_path, upstream.url) as gateway:
        await until_ready(gateway)
        loads = start_load(gateway)
        resident = max(_resident_bytes(await asyncio.to_thread(gateway.metrics)))
        for number in range(10):
            gateway.config["sessions"] = {"headers": [f"x-session-{number}"]}
            gateway.write_config()
            if number % 2:
                gateway.process.send_signal(signal.SIGHUP)
            else:
                assert await asyncio.to_thread(gateway.manage, RELOADED, "POST")
            await asyncio.sleep(0.2)  # the load in between
        gateway.config_path.write_text("server: {prot: 1}\n")
        gateway.process.send_signal(signal.SIGHUP)
        await asyncio.to_thread(gateway.wait_log, "did you mean")
        await asyncio.sleep(0.2)
        calls = await stop_load(loads)
        metrics = await asyncio.to_thread(gateway.metrics)
        assert metrics['headgate_config_reloads_total{result="applied"}'] >= 10
        assert metrics['headgate_config_reloads_total{result="refused"}'] >= 1
        assert max(_resident_bytes(metrics)) - resident < 20 << 20
        assert not (found := faults(calls, gateway, upstream)), "\n".join(found[:20])
        assert len(calls) > 100


def _resident_bytes(metrics: dict[str, float]) -> list[float]:
    return [value for name, value in metrics.items() if name.startswith("headgate_worker_resident_bytes")]


def stream_request() -> bytes:
    body = json.dumps({"model": MODEL, "stream": True, "messages": []}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {KEY}\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


async def terminated(gateway: Gateway, client: RawClient) -> None:
    """SIGTERM, once the stream is under way; returns when the gateway takes no connection any more."""
    await client.send(stream_request())
    assert (await client.receive()).startswith(b"HTTP/1.1 200")
    gateway.process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            probe = await RawClient.connect(gateway.port)
        except ConnectionRefusedError:
            return
        probe.close()
        await asyncio.sleep(0.02)
    raise AssertionError("connections are still taken ten seconds after SIGTERM")


async def test_a_stream_that_is_under_way_at_sigterm_ends_in_peace(tmp_path) -> None:
    async with await ScriptedUpstream.start() as upstream:
        gate = asyncio.Event()
        upstream.script("chat", STREAM.gate_after(2, gate))
        gateway = loaded_gateway(tmp_path, upstream.url)
        await asyncio.to_thread(gateway.start)
        client = await RawClient.connect(gateway.port)
        await terminated(gateway, client)
        gate.set()
        rest = await client.read_to_end()
        client.close()
        assert rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        assert await asyncio.to_thread(gateway.stop) == 0
        (row,) = gateway.rows(1)
        assert (row["ended"], row["is_estimated"]) == ("completed", 0)


async def test_a_stream_that_outlives_the_drain_is_told_so_and_settled(tmp_path) -> None:
    async with await ScriptedUpstream.start() as upstream:
        upstream.script("chat", STREAM.hang_after(3))
        gateway = loaded_gateway(tmp_path, upstream.url, server={"drain_timeout_s": 0.5})
        await asyncio.to_thread(gateway.start)
        client = await RawClient.connect(gateway.port)
        await terminated(gateway, client)
        rest = await client.read_to_end()
        client.close()
        error = json.loads(rest.rpartition(b"data: ")[2].split(b"\n\n")[0])["error"]
        assert (error["code"], error["type"]) == ("gateway_shutting_down", "server_error")
        assert not rest.endswith(b"0\r\n\r\n")
        assert b"[DONE]" not in rest
        assert await asyncio.to_thread(gateway.stop) == 0
        assert await upstream.journal[0].wait_end() == "peer gone"
        (row,) = gateway.rows(1)
        assert (row["ended"], row["status"], row["is_estimated"]) == ("drained", 200, 1)
        assert row["output_tokens"] > 0
        assert row["cost_nanousd"] > 0
        assert list((tmp_path / "data/inflight").iterdir()) == []
