"""A process that was stopped (SIGSTOP) past its lease and comes to again finds its job another's, and changes nothing.

`HEADGATE_TEST_ZOMBIES=100` for the full run.
"""

import os
from contextlib import ExitStack

import pytest

from gateway.overflow.job import LEASE_S
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.queue_jobs import NO_LIMITS, a_job
from tests.support.queue_owner import Owner, SharedClock

pytestmark = pytest.mark.chaos

ZOMBIES = int(os.environ.get("HEADGATE_TEST_ZOMBIES", "8"))


async def haunt(directory, mutant: str = "") -> tuple[list[str], list[bytes], int]:
    """What the zombies were told, the results that are kept, and how many ends wait for the ledger.

    Every other zombie comes to while the other one still runs its job; every third time it is the same owner's name.
    """
    clock = SharedClock(directory)
    store = SqliteQueueStore(directory, clocks=clock.clocks)
    told: list[str] = []
    with ExitStack() as ending:
        zombie = ending.enter_context(Owner(directory, "node/worker/1", mutant))
        others = [ending.enter_context(Owner(directory, f"node/worker/{n}", mutant)) for n in (1, 2)]
        for number in range(ZOMBIES):
            other = others[number % 3 != 0]
            await store.submit(a_job(f"job_{number}"), NO_LIMITS)
            assert zombie.ask("claim") == [f"job_{number}", 1]
            zombie.freeze()
            zombie.tell("finish", f"zombie {number}")
            clock.forward(LEASE_S + 1)
            other.ask("sweep")
            assert other.ask("claim") == [f"job_{number}", 2]
            if number % 2:
                zombie.thaw()
                told.append(zombie.hear())
                other.ask("finish", f"living {number}")
            else:
                assert other.ask("finish", f"living {number}") == "finished"
                zombie.thaw()
                told.append(zombie.hear())
    results = [await store.result("t1", f"job_{number}") for number in range(ZOMBIES)]
    settled = await store.take_settled("o", ZOMBIES * 2)
    await store.close()
    assert len({row.job_id for row in settled}) == ZOMBIES
    wrong = [row for row in settled if b"zombie" in row.ledger_row]
    return told, [result.body for result in results if result is not None], len(wrong)


async def test_the_finish_of_a_zombie_is_refused_every_time(tmp_path, capsys):
    told, results, wrongly_billed = await haunt(tmp_path)
    with capsys.disabled():
        print(f"\n{told.count('lost')} of {ZOMBIES} zombies refused")
    assert told == ["lost"] * ZOMBIES
    assert results == [f"living {number}".encode() for number in range(ZOMBIES)]
    assert wrongly_billed == 0


async def test_a_build_without_a_fence_is_caught(tmp_path):
    told, results, wrongly_billed = await haunt(tmp_path, "fences_nobody")
    assert told.count("finished") == wrongly_billed == ZOMBIES // 2
    assert any(result.startswith(b"zombie") for result in results)
