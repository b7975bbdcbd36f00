"""The process: how it starts, how it ends, and with whom."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path

import aiohttp
import pytest

from tests.support.simulator_process import SimulatorProcess

pytestmark = pytest.mark.e2e  # real processes

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "ignore_eos": True}
ROOT = Path(__file__).parents[3]


def run(*options, timeout=60):
    command = [sys.executable, "-m", "local_engine.simulator", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


async def test_by_default_sigterm_breaks_off_at_once_with_an_error_and_still_done():
    with SimulatorProcess(time_scale=1) as simulator:
        async with aiohttp.ClientSession(simulator.url) as http:
            async with http.post(CHAT, json={**BODY, "stream": True, "max_tokens": 5000}) as stream:
                await stream.content.readuntil(b"simul")
                whole = asyncio.ensure_future(http.post(CHAT, json={**BODY, "max_tokens": 5000}))
                while json.loads(await asyncio.to_thread(simulator.get, "/load"))["server_load"] < 2:
                    await asyncio.sleep(0.01)
                simulator.process.send_signal(signal.SIGTERM)
                events = (await stream.content.read()).decode().strip().split("\n\n")
            error = json.loads(events[-2].removeprefix("data: "))["error"]
            assert (error["code"], events[-1]) == (500, "data: [DONE]")
            assert (await whole).status == 500
        assert await asyncio.to_thread(simulator.process.wait, 5) == 0


async def test_with_a_shutdown_timeout_sigterm_finishes_what_runs_and_refuses_what_comes():
    with SimulatorProcess(time_scale=1, shutdown_timeout=30) as simulator:
        async with aiohttp.ClientSession(simulator.url) as http:
            async with http.post(CHAT, json={**BODY, "stream": True}) as stream:
                await stream.content.readuntil(b"simul")
                simulator.process.send_signal(signal.SIGTERM)
                refused = 200
                while refused == 200:
                    async with http.post(CHAT, json={**BODY, "max_tokens": 1}) as answer:
                        refused = answer.status
                        message = await answer.text()
                assert refused == 500
                assert "cannot schedule new futures after shutdown" in message
                assert (await http.get("/health")).status == 200
                rest = (await stream.content.read()).decode()
            assert '"finish_reason":"length"' in rest
            assert rest.endswith("data: [DONE]\n\n")
            assert "error" not in rest
        assert await asyncio.to_thread(simulator.process.wait, 5) == 0


async def test_a_drain_that_takes_too_long_is_broken_off():
    with SimulatorProcess(time_scale=1, shutdown_timeout=0.3) as simulator:
        body = {**BODY, "stream": True, "max_tokens": 5000}
        async with aiohttp.ClientSession(simulator.url) as http, http.post(CHAT, json=body) as stream:
            await stream.content.readuntil(b"simul")
            simulator.process.send_signal(signal.SIGTERM)
            assert b'"error"' in await stream.content.read()
        assert await asyncio.to_thread(simulator.process.wait, 5) == 0


def test_it_ends_when_the_parent_it_was_told_of_ends():
    parent = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with SimulatorProcess(parent_pid=parent.pid) as simulator:
        assert simulator.process.poll() is None
        parent.communicate(b"\n")
        assert simulator.process.wait(5) == 0


def test_it_does_not_start_for_a_parent_that_is_gone():
    parent = subprocess.Popen([sys.executable, "-c", ""])
    parent.wait()
    assert run("--port=0", f"--parent-pid={parent.pid}").returncode == 0


def test_it_serves_on_an_inherited_socket():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        process = subprocess.Popen(
            [sys.executable, "-m", "local_engine.simulator", f"--fd={listening.fileno()}"],
            cwd=ROOT,
            pass_fds=[listening.fileno()],
            stdout=subprocess.PIPE,
        )
        try:
            ready = process.stdout.readline().decode()
            assert f"http://127.0.0.1:{listening.getsockname()[1]} " in ready
        finally:
            process.kill()
            process.communicate()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-model-len=999999"], "raise num_blocks or lower max_model_len"),
        (["--max-num-seqs=0"], "max_num_seqs must be at least 1"),
        (["--time-scale=-1"], "must not be negative"),
        (["--decode-us-per-token=-1"], "must not be negative"),
        (["--port=http"], "invalid int value"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_options_that_cannot_work_are_refused_with_a_sentence(options, told):
    ended = run(*options)
    assert ended.returncode == 2
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_reported_without_a_traceback():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = run(f"--port={taken.getsockname()[1]}")
    assert ended.returncode == 1
    assert "cannot listen" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_is_small():
    with SimulatorProcess() as simulator:
        body = json.dumps({"prompt": "water " * 4000, "max_tokens": 200}).encode()
        for _ in range(20):
            simulator.post("/v1/completions", body)
        status = Path(f"/proc/{simulator.process.pid}/status")
        if not status.exists():
            pytest.skip("needs /proc")
        resident = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        assert int(resident.split()[1]) < 60 * 1024
