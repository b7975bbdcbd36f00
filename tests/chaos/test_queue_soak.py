"""Jobs through every door for a while: memory, descriptors, the logs of the databases and the keys in Redis stay where they
are, and everything ends. Q12.

`HEADGATE_TEST_SOAK_MINUTES=30 HEADGATE_TEST_SOAK_RATE=200` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import asyncio
import os
import random
import time
from contextlib import ExitStack

import pytest

from gateway.overflow.job import FINAL
from gateway.overflow.store import QueueStore
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.journal_upstream import JournalUpstream
from tests.support.load import PRICE, loaded_gateway
from tests.support.queue_run import Receiver
from tests.support.queue_soak import NARROW, Soak
from tests.support.queue_stores import STORES, redis_queue
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.chaos

MINUTES = float(os.environ.get("HEADGATE_TEST_SOAK_MINUTES", "0.25"))
RATE = float(os.environ.get("HEADGATE_TEST_SOAK_RATE", "12"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
IS_LONG = MINUTES >= 15
WARM_S = 300.0 if IS_LONG else 0.0  # until what is kept for an hurried month has come to its size
PATIENCE_S = 240.0
START_S = 300.0


def configured(directory, upstream_url: str, redis: RedisServer | None):
    """A wide pool, and one that has room for two; a model that waits there, one that asks, one that nobody serves."""
    pools = {
        name: {
            "type": "vllm",
            "endpoints": [f"{url}/v1"],
            "placement": {"max_in_flight": slots},
            "health": {"failures": 0, "probe": "none"},
        }
        for name, url, slots in (
            ("up", upstream_url, 64),
            ("tight", upstream_url, 2),
            ("off", "http://127.0.0.1:9", 1),
        )
    }

    def model(pool: str, **more):
        return {"targets": [{"pool": pool, "model": "scripted-1"}], "price": PRICE, **more}

    models = {
        "m": model("up"),
        NARROW: model("tight"),
        "held": model("tight", on_full="hold"),
        "nowhere": model("off"),
    }
    storage = {"directory": str(directory / "data")}
    if redis is not None:
        storage["redis"] = {"url": redis.url, "node": "one", "timeout_ms": 2000}
    queue = {
        "enabled": True,
        "expires_s": 120,
        "attempts": 20,
        "webhooks": {"networks": ["127.0.0.0/8"]},
        "files": {"keep_s": 3600},  # each is deleted; here it is not to be gone before
    }
    return loaded_gateway(
        directory,
        upstream_url,
        module="tests.mutants.gateway",
        environ={"HEADGATE_TEST_MUTANT": "hurries"},
        pools=pools,
        models=models,
        queue=queue,
        storage=storage,
    )


async def rest(store: QueueStore) -> dict[str, int]:
    """Jobs that have not ended, once there are none or nobody waits any longer."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        states = (await store.stats()).states
        left = {state: count for state, count in states.items() if count and state not in FINAL}
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("kind", STORES)
async def test_nothing_grows_while_jobs_come_and_go_through_every_door(tmp_path, capsys, kind):
    receiver = Receiver(random.Random(SEED))
    with ExitStack() as ending:
        upstream = ending.enter_context(JournalUpstream(tmp_path / "upstream.journal"))
        redis = ending.enter_context(RedisServer(tmp_path / "redis")) if kind == "redis" else None
        gateway = configured(tmp_path, upstream.url, redis)
        async with receiver.receiving():
            await asyncio.to_thread(gateway.start, START_S)
            try:
                soak = Soak(gateway, RATE, SEED, redis, receiver.url, 10.0 if IS_LONG else 1.0)
                await soak.run(MINUTES * 60)
                store = (
                    SqliteQueueStore(tmp_path / "data")
                    if redis is None
                    else redis_queue(redis, tmp_path / "observer", tag="headgate", timeout_s=60.0)
                )
                left = await rest(store)
                await store.close()
                soak.samples.append(await asyncio.to_thread(soak.sample))
                await asyncio.to_thread(gateway.stop)
            finally:
                gateway.kill()
    with capsys.disabled():
        print(f"\nHEADGATE_TEST_SEED={SEED}, {kind}, {MINUTES:g} min at {RATE:g}/s: {soak.told(WARM_S)}")
    assert not left, "jobs have not ended"
    assert "Traceback" not in gateway.log()
    bad = {what: count for what, count in soak.answers.items() if what.rsplit(" ", 1)[1] not in GOOD}
    assert not bad, bad
    for sample in soak.samples:
        assert max(sample.files_mib[name] for name in sample.files_mib if name.endswith("-wal")) <= 64
    if IS_LONG:
        for name in soak.samples[0].rss_mib:
            assert soak.slope([each.rss_mib[name] for each in soak.samples], WARM_S) < 1.0, (
                f"memory of {name}"
            )


# 429 and 503 are the answers where there was no room; 409: its result was asked for after its expiry or its cancellation.
GOOD = {"200", "202", "204", "409", "410", "429", "502", "503", "504"}
