"""kill -9 of workers under load, at seeded random moments: every request has one row, and the right one.

`HEADGATE_TEST_KILLS=200` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import os
import random

import pytest

from tests.mutants.recovery import MUTANTS as RECOVERY_MUTANTS
from tests.support.kill_run import KillRun

KILLS = int(os.environ.get("HEADGATE_TEST_KILLS", "10"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
MUTANTS = ("opens_no_intent", "frees_before_commit", "settles_in_memory_only", *RECOVERY_MUTANTS)
FEW_MUTANTS = ("opens_no_intent", "recovers_without_idempotence")

pytestmark = pytest.mark.chaos


async def test_every_request_has_one_right_row_however_many_workers_are_killed(tmp_path, capsys) -> None:
    run = KillRun(tmp_path, SEED)
    with capsys.disabled():
        print(f"\nHEADGATE_TEST_SEED={SEED}")
        await run.kill_workers(KILLS)
        faults = run.faults()
        print(run.summary())
    assert not faults, "\n".join([f"{len(faults)} faults with seed {SEED}", *faults[:20]])
    assert run.between <= 1 + KILLS // 20, "a row is made too long after its answer"
    outcomes = [call.outcome for call in run.calls]
    assert outcomes.count("ok") > KILLS * 10, "too little load to show anything"
    assert outcomes.count("unknown") > KILLS, "the kills hit nothing"


@pytest.mark.parametrize("mutant", MUTANTS if KILLS >= 100 else FEW_MUTANTS)
async def test_broken_builds_are_caught(tmp_path, mutant) -> None:
    for seed in range(SEED, SEED + 8):  # what goes wrong for a moment only needs the luck of a kill in it
        directory = tmp_path / str(seed)
        directory.mkdir()
        run = KillRun(directory, seed, module="tests.mutants.gateway", mutant=mutant)
        await run.kill_workers(2)
        if run.faults():
            return
    pytest.fail(f"{mutant} survived 16 kills unnoticed, seeds from {SEED}")
