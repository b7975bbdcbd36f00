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

KILLS = int(os.environ.get("HEADGATE_TEST_QUEUE_KILLS", "2"))
JOBS = int(os.environ.get("HEADGATE_TEST_QUEUE_JOBS", "80"))
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


@pytest.mark.skipif(KILLS < 100, reason="minutes; test_queue_acks and test_queue_zombies have quicker ones")
@pytest.mark.parametrize("mutant", ["acknowledges_before_the_commit", "settles_twice"])
async def test_broken_builds_are_caught(tmp_path, mutant):
    for seed in range(SEED, SEED + 6):  # what goes wrong for a moment only needs the luck of a kill in it
        directory = tmp_path / str(seed)
        directory.mkdir()
        run = QueueRun(directory, seed, 100, module="tests.mutants.gateway", mutant=mutant)
        await run.kill(4)
        expected = "I1: " if mutant.startswith("ack") else "I4: "
        if any(fault.startswith(expected) for fault in run.faults()):
            return
    pytest.fail(f"{mutant} survived 24 kills unnoticed, seeds from {SEED}")
