"""Two whole gateways on one Redis, which is killed again and again and flushed once, while jobs are handed in to both, run,
cancelled and read: what either acknowledged ends once, and is billed once in both ledgers. Q3.

`HEADGATE_TEST_REDIS_KILLS=30 HEADGATE_TEST_QUEUE_JOBS=1500` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import os
import random

import pytest

from tests.support.queue_nodes_run import NodesRun

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("HEADGATE_TEST_REDIS_KILLS", "2"))
JOBS = int(os.environ.get("HEADGATE_TEST_QUEUE_JOBS", "60"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))


async def test_whatever_redis_loses_no_job_of_two_gateways_is_lost_or_billed_twice(tmp_path, capsys):
    run = NodesRun(tmp_path, SEED, JOBS)
    await run.trouble(KILLS, workers=2 if KILLS > 10 else 1)
    found = run.faults()
    with capsys.disabled():
        print(f"\nHEADGATE_TEST_SEED={SEED}: {run.summary()}, {run.flushes} flush")
    assert not found, "\n".join([f"{len(found)} faults with seed {SEED}", *found[:20]])
