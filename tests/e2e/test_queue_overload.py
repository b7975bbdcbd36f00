"""Five times what an engine can do, for a few seconds; held requests past their time; a drain and a restart with jobs.

Real gateways in front of the simulator. The long form of the overload is `python -m bench.queue_load overload`.
"""

import asyncio
import json
from collections import Counter

import pytest

from tests.e2e.raw import CHAT, ask, called
from tests.support.gateway_process import Gateway
from tests.support.simulator_process import SimulatorProcess

pytestmark = pytest.mark.e2e

QUEUE = {"x_headgate_on_full": "queue"}
SLOTS = 4
FINAL = {"succeeded", "failed", "dead", "cancelled", "expired"}


@pytest.fixture(scope="module")
def engine():
    with SimulatorProcess(
        time_scale=1, max_num_seqs=SLOTS, model="demo", decode_us_per_token=10_000
    ) as running:
        yield running


def config(engine, **queue):
    target = {"targets": [{"pool": "engines", "model": "demo"}], "price": {"input": 1, "output": 2}}
    return {
        "pools": {
            "engines": {
                "type": "vllm",
                "endpoints": [f"{engine.url}/v1"],
                "placement": {"max_in_flight": SLOTS},
                "health": {"failures": 0, "probe": "none"},
            }
        },
        "models": {"demo": target, "held": {**target, "on_full": "hold"}},
        "overload": {"default": {"wait_s": 1, "waiting": 8}},
        "queue": {"enabled": True, "expires_s": 3600, **queue},
    }


async def ended(gateway, job_id):
    async with asyncio.timeout(180):
        while True:
            answer = await ask(gateway, f"/v1/jobs/{job_id}?wait=5", b"", "GET")
            told = json.loads(answer.body)
            if told["status"] in FINAL:
                return told


async def test_five_times_too_much_is_answered_refused_or_queued_and_every_job_ends(engine, tmp_path):
    with Gateway(tmp_path, workers=2, **config(engine)) as gateway:
        body = called(CHAT, "demo", max_tokens=20)
        wishes = [QUEUE if n % 3 == 0 else {} for n in range(20 * SLOTS)]
        answers = await asyncio.gather(*(ask(gateway, CHAT, body, **wish) for wish in wishes))
        statuses = Counter((bool(wish), answer.status) for wish, answer in zip(wishes, answers, strict=True))
        assert {status for asked, status in statuses if asked} <= {200, 202}
        assert {status for asked, status in statuses if not asked} <= {200, 429, 503}
        for answer in answers:
            assert answer.status in (200, 202) or "retry-after" in answer.headers
        jobs = [json.loads(answer.body)["id"] for answer in answers if answer.status == 202]
        assert jobs
        states = Counter([(await ended(gateway, job_id))["status"] for job_id in jobs])
        assert states == {"succeeded": len(jobs)}
        rows = {job_id: gateway.row(job_id, within_s=30) for job_id in jobs}
        assert all(row["cost_nanousd"] > 0 for row in rows.values())


async def test_who_was_sent_away_goes_on_waiting_for_the_same_job(engine, tmp_path):
    """No room but a trickle's: the hold ends long before the job does."""
    settings = config(engine, hold={"hold_s": 0.5, "attach_s": 300})
    with Gateway(tmp_path, workers=1, **settings) as gateway:
        gateway.manage("/api/jobs/drain", "POST")
        long = called(CHAT, "demo", max_tokens=20_000, ignore_eos=True)
        busy = [asyncio.create_task(ask(gateway, CHAT, long)) for _ in range(SLOTS)]
        await full(gateway)
        body = called(CHAT, "held", max_tokens=20)
        first = await ask(gateway, CHAT, body)
        assert (first.status, json.loads(first.body)["error"]["code"]) == (503, "held_too_long")
        assert first.headers["x-should-retry"] == "true"
        asked = await ask(gateway, CHAT, called(CHAT, "held", max_tokens=21), **QUEUE)
        assert asked.status == 202
        for each in busy:
            each.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        gateway.manage("/api/jobs/drain", "DELETE")
        async with asyncio.timeout(180):
            while (answer := await ask(gateway, CHAT, body)).status == 503:
                assert answer.headers["x-headgate-job"] == first.headers["x-headgate-job"]
        assert answer.status == 200
        assert answer.headers["x-headgate-job"] == first.headers["x-headgate-job"]
        listed = json.loads((await ask(gateway, "/v1/jobs", b"", "GET")).body)["data"]
        assert len(listed) == 2
        gateway.row(first.headers["x-headgate-job"])


async def test_jobs_outlive_a_drain_and_a_restart(engine, tmp_path):
    """Some run and may end, some run for too long and go back, some wait: each is run to its end, and billed once."""
    settings = config(engine) | {"server": {"drain_timeout_s": 0.5}}
    with Gateway(tmp_path, workers=2, **settings) as gateway:
        made = []
        for tokens in (5, 250, 250, 250, 250, 10, 10):
            body = {"endpoint": CHAT, "body": called(CHAT, "demo", max_tokens=tokens, ignore_eos=True)}
            made.append(json.loads((await ask(gateway, "/v1/jobs", body)).body)["id"])
        async with asyncio.timeout(60):
            while not await states(gateway, "running"):
                await asyncio.sleep(0.05)
        assert await asyncio.to_thread(gateway.stop, 60) == 0
        gateway.start()
        assert {(await ended(gateway, job_id))["status"] for job_id in made} == {"succeeded"}
        rows = [gateway.row(job_id, within_s=30) for job_id in made]
        assert len({row["request_id"] for row in rows}) == len(made)
    assert "Traceback" not in gateway.log()


async def states(gateway, state):
    return json.loads((await ask(gateway, f"/v1/jobs?status={state}", b"", "GET")).body)["data"]


async def full(gateway):
    """Until every slot is taken."""
    async with asyncio.timeout(60):
        while True:
            metrics = await asyncio.to_thread(gateway.metrics)
            if metrics['headgate_requests_in_flight{endpoint="engines"}'] >= SLOTS:
                return
            await asyncio.sleep(0.05)
