"""kill -9 of workers while a batch is uploaded, checked, run and written: every line is answered once, and billed once.

`HEADGATE_TEST_BATCH_LINES=50000 HEADGATE_TEST_BATCH_KILLS=20` for the full run, `HEADGATE_TEST_SEED` replays one.
With `HEADGATE_TEST_BATCH_MEMORY=1` a file of 200 MB is uploaded and checked, and the memory of the workers watched.
"""

import contextlib
import http.client
import json
import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import openai
import pytest

from tests.support.gateway_process import KEY, Gateway
from tests.support.nodes import worker_pids
from tests.support.simulator_process import SimulatorProcess

pytestmark = pytest.mark.chaos

LINES = int(os.environ.get("HEADGATE_TEST_BATCH_LINES", "300"))
KILLS = int(os.environ.get("HEADGATE_TEST_BATCH_KILLS", "3"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
PATIENCE_S = 120.0 + LINES / 10
URL = "/v1/chat/completions"
MIB = 1024 * 1024


def line(number: int, filler: str = "") -> bytes:
    body = {"model": "demo", "max_tokens": 2, "messages": [{"role": "user", "content": f"{number}{filler}"}]}
    return (
        json.dumps({"custom_id": f"line-{number}", "method": "POST", "url": URL, "body": body}).encode()
        + b"\n"
    )


class Memory:
    """The most that any worker had, above what the first ones had at first, in bytes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._first = max(resident(pid) for pid in worker_pids(gateway))
        self._is_over = threading.Event()
        self.growth_bytes = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join()

    def _watch(self):
        while not self._is_over.wait(0.02):
            with contextlib.suppress(OSError):  # killed a moment ago
                for pid in worker_pids(self._gateway):
                    self.growth_bytes = max(self.growth_bytes, resident(pid) - self._first)


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.fixture
def running(tmp_path):
    with SimulatorProcess(time_scale=0, model="demo") as engine:
        pools = {"sim": {"endpoints": [f"{engine.url}/v1"], "health": {"failures": 0}}}
        price = {"input": 1, "output": 2}
        models = {"demo": {"targets": [{"pool": "sim"}], "price": price, "async_price_factor": 0.5}}
        queue = {"enabled": True, "running": 64}
        with Gateway(tmp_path, workers=2, queue=queue, pools=pools, models=models) as gateway:
            yield gateway


def client_of(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=20, timeout=60)


def kill_one(gateway: Gateway, chance: random.Random) -> None:
    """None, if both have just been killed."""
    for pid in chance.sample(pids := worker_pids(gateway), min(1, len(pids))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_workers_may_be_killed_while_a_batch_is_checked_and_run(running, capsys):
    chance = random.Random(SEED)
    lines = [line(number) for number in range(LINES)]
    with client_of(running) as client:
        half_uploaded(running, b"".join(lines))
        kill_one(running, chance)
        file = client.files.create(file=("in.jsonl", b"".join(lines)), purpose="batch")
        assert [each.id for each in client.files.list()] == [file.id], "half a file was shown"
        asked = {"input_file_id": file.id, "endpoint": URL, "completion_window": "24h"}
        batch = client.batches.create(**asked, extra_headers={"Idempotency-Key": f"once-{SEED}"})
        began_at, killed, memory = time.monotonic(), 0, Memory(running)
        kill_at = began_at + chance.uniform(0, 0.2)
        with memory:
            while batch.status not in {"completed", "failed", "expired", "cancelled"}:
                now = time.monotonic()
                assert now - began_at < PATIENCE_S, (
                    f"seed {SEED}: still {batch.status} {batch.request_counts}"
                )
                if killed < KILLS and now >= kill_at:
                    kill_one(running, chance)
                    killed += 1
                    kill_at = time.monotonic() + chance.uniform(0.5, 8.0)
                time.sleep(0.05)
                batch = client.batches.retrieve(batch.id)
        took_s = time.monotonic() - began_at
        told = f"HEADGATE_TEST_SEED={SEED}: {LINES} lines, {killed} kills, {took_s:.1f} s, "
        with capsys.disabled():
            print(f"\n{told}workers grew by at most {memory.growth_bytes / MIB:.1f} MiB")
        assert (batch.status, batch.error_file_id) == ("completed", None), f"seed {SEED}: {batch}"
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (LINES, LINES, 0)
        output = [json.loads(each) for each in client.files.content(batch.output_file_id).text.splitlines()]
        answered = Counter(each["custom_id"] for each in output)
        assert answered == Counter(f"line-{number}" for number in range(LINES)), f"seed {SEED}"
        files = client.files.list(purpose="batch_output")
        assert [each.id for each in files] == [batch.output_file_id]
    billed = settled(running)
    assert billed == Counter(each["response"]["request_id"] for each in output), f"seed {SEED}"


def half_uploaded(gateway: Gateway, data: bytes) -> None:
    """A client that leaves before the end."""
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    headers = {
        "authorization": f"Bearer {KEY}",
        "content-type": "multipart/form-data; boundary=b",
        "content-length": str(len(data) + 10_000),
    }
    connection.putrequest("POST", "/v1/files")
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    connection.send(b'--b\r\ncontent-disposition: form-data; name="file"; filename="half"\r\n\r\n' + data)
    connection.close()


def settled(gateway: Gateway) -> Counter:
    """Of each job, its rows in the ledger; once every one of them has arrived."""
    rows = gateway.rows(LINES, within_s=PATIENCE_S)
    jobs = [row for row in rows if row["request_id"].startswith("job_")]
    assert {row["price_source"] for row in jobs} == {"config x 0.5"}
    return Counter(row["request_id"] for row in jobs)


@pytest.mark.skipif("HEADGATE_TEST_BATCH_MEMORY" not in os.environ, reason="takes minutes")
def test_the_largest_file_is_uploaded_and_checked_in_flat_memory(running, capsys):
    filler = "x" * 3_900
    data = b"".join(line(number, filler) for number in range(49_000)) + b"{]\n"
    with client_of(running) as client, Memory(running) as memory:
        began_at = time.monotonic()
        file = client.files.create(file=("in.jsonl", data), purpose="batch")
        uploaded_s, upload_bytes = time.monotonic() - began_at, memory.growth_bytes
        asked = {"input_file_id": file.id, "endpoint": URL, "completion_window": "24h"}
        batch = client.batches.create(**asked)
        slowest_s = 0.0
        while batch.status == "validating":
            asked_at = time.monotonic()
            batch = client.batches.retrieve(batch.id)
            slowest_s = max(slowest_s, time.monotonic() - asked_at)
        checked_s = time.monotonic() - began_at - uploaded_s
    with capsys.disabled():
        print(
            f"\n{len(data) / MIB:.0f} MiB: uploaded in {uploaded_s:.1f} s (+{upload_bytes / MIB:.1f} MiB), "
            f"checked in {checked_s:.1f} s (+{memory.growth_bytes / MIB:.1f} MiB), slowest answer {slowest_s:.2f} s"
        )
    assert (batch.status, batch.errors.data[0].line) == ("failed", 49_001)
    assert memory.growth_bytes < 64 * MIB
