"""kill -9 of a process that hands in jobs: what it was told is stored, is stored.

`HEADGATE_TEST_ACK_KILLS=200` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gateway.overflow.job import JobFilter
from gateway.stores.queue_sqlite import SqliteQueueStore

pytestmark = pytest.mark.chaos

KILLS = int(os.environ.get("HEADGATE_TEST_ACK_KILLS", "4"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
ROOT = Path(__file__).parents[2]


async def lost(directory: Path, seed: int, mutant: str = "") -> tuple[int, int]:
    """Jobs that were acknowledged before a kill, and how many of them are not there."""
    command = [sys.executable, "-m", "tests.support.queue_submitter", str(directory), mutant]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        acked = {process.stdout.readline().decode().strip()}
        time.sleep(random.Random(seed).uniform(0.01, 0.3))  # not a wait for something: the moment of the kill
        process.kill()
        acked |= set(process.stdout.read().decode().split())
    store = SqliteQueueStore(directory)
    found, cursor = set[str](), None
    while True:
        page = await store.list_jobs(JobFilter(), cursor, 500)
        found |= {job.id for job in page.jobs}
        cursor = page.cursor
        if cursor is None:
            break
    await store.close()
    return len(acked), len(acked - found)


async def test_no_acknowledged_job_is_lost_when_its_process_is_killed(tmp_path, capsys):
    outcomes = [await lost(tmp_path, SEED + kill) for kill in range(KILLS)]
    acked, missing = (sum(each) for each in zip(*outcomes, strict=True))
    with capsys.disabled():
        print(f"\nHEADGATE_TEST_SEED={SEED}: {KILLS} kills, {acked} jobs acknowledged, {missing} lost")
    assert acked > KILLS
    assert missing == 0


async def test_a_build_that_acknowledges_before_the_commit_is_caught(tmp_path):
    for seed in range(SEED, SEED + 30):  # the first kill or the second, unless it hits between two commits
        if (await lost(tmp_path / str(seed), seed, "acknowledges_before_the_commit"))[1]:
            return
    pytest.fail(f"30 kills lost nothing, seeds from {SEED}")
