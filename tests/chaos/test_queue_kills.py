"""kill -9 of workers, and of the whole service, while jobs are handed in, run, cancelled and read: nothing that was
acknowledged is lost, nothing is billed twice.

`HEADGATE_TEST_QUEUE_KILLS=200 HEADGATE_TEST_QUEUE_JOBS=5000` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import os
import random

import pytest

from tests.support.queue_checker import amplification
from tests.support.queue_run import QueueRun

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("HEADGATE_TEST_QUEUE_KILLS", "4"))
JOBS = int(os.environ.get("HEADGATE_TEST_QUEUE_JOBS", "150"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))


async def show(run: QueueRun, capsys) -> None:
    found = run.faults()
    with capsys.disabled():
        print(f"\nHEADGATE_TEST_SEED={SEED}: {run.summary()}")
    assert not found, "\n".join([f"{len(found)} faults with seed {SEED}", *found[:20]])
    assert amplification(run.seen) <= 1 + run.kills * 32 / JOBS


async def test_whoever_of_the_workers_is_killed_no_job_is_lost_or_billed_twice(tmp_path, capsys):
    run = QueueRun(tmp_path, SEED, JOBS)
    await run.kill(KILLS)
    await show(run, capsys)


async def test_however_often_the_whole_service_is_killed_no_job_is_lost_or_billed_twice(tmp_path, capsys):
    run = QueueRun(tmp_path, SEED, JOBS)
    await run.kill(max(1, KILLS // 2), is_of_all=True)
    await show(run, capsys)
