"""A process that was stopped (SIGSTOP) past its lease and comes to again finds its job another's, and changes nothing.

`HEADGATE_TEST_ZOMBIES=100` for the full run.
"""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from gateway.overflow.job import LEASE_S
from tests.support.queue_jobs import NO_LIMITS, a_job
from tests.support.queue_owner import Owner, SharedClock, store_of
from tests.support.queue_stores import STORES
from tests.support.redis_server import RedisServer

pytestmark = pytest.mark.chaos

ZOMBIES = int(os.environ.get("HEADGATE_TEST_ZOMBIES", "8"))


class Haunted(NamedTuple):
    """What the zombies were told, the results that are kept, and how many ends of zombies wait for the ledger."""

    told: list[str]
    results: list[bytes]
    wrongly_billed: int


@pytest.fixture(params=STORES)
def redis_url(request, tmp_path):
    """ "": the store is SQLite."""
    if request.param == "sqlite":
        yield ""
    else:
        with RedisServer(tmp_path / "redis") as server:
            yield server.url


async def haunt(directory: Path, redis_url: str, mutant: str = "") -> Haunted:
    """Every other zombie comes to while the other one still runs its job; every third time it is the same owner's name on the
    same node, else another node's."""
    clock = SharedClock(directory)
    store = store_of(directory, "caller", redis_url)
    told: list[str] = []
    with ExitStack() as ending:
        zombie, *others = (
            ending.enter_context(Owner(directory, name, mutant, redis_url))
            for name in ("node/worker/1", "node/worker/1", "elsewhere/worker/2")
        )
        for number in range(ZOMBIES):
            other = others[number % 3 != 0]
            await store.submit(a_job(f"job_{number}"), NO_LIMITS)
            job_id, fence = zombie.ask("claim")
            assert job_id == f"job_{number}"
            zombie.freeze()
            zombie.tell("finish", f"zombie {number}")
            clock.forward(LEASE_S + 1)
            other.ask("sweep")
            assert other.ask("claim") == [job_id, fence + 1]
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
    return Haunted(told, [result.body for result in results if result is not None], len(wrong))


async def test_the_finish_of_a_zombie_is_refused_every_time(tmp_path, redis_url, capsys):
    haunted = await haunt(tmp_path, redis_url)
    with capsys.disabled():
        where = "redis" if redis_url else "sqlite"
        print(f"\n{where}: {haunted.told.count('lost')} of {ZOMBIES} zombies refused")
    assert haunted.told == ["lost"] * ZOMBIES
    assert haunted.results == [f"living {number}".encode() for number in range(ZOMBIES)]
    assert haunted.wrongly_billed == 0


async def test_a_build_without_a_fence_is_caught(tmp_path, redis_url):
    mutant = "fences_nobody_in_redis" if redis_url else "fences_nobody"
    haunted = await haunt(tmp_path, redis_url, mutant)
    assert haunted.told.count("finished") == haunted.wrongly_billed == ZOMBIES // 2
    assert any(result.startswith(b"zombie") for result in haunted.results)
