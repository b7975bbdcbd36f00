"""A process that hands in jobs as fast as it can, and says the id of each once it was acknowledged.

    python -m tests.support.queue_submitter DIRECTORY [MUTANT]

Until it is killed.
"""

import asyncio
import os
import sys
from pathlib import Path

from gateway.overflow.job import new_id
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.queue_jobs import NO_LIMITS, a_job

AT_ONCE = 20


async def main(directory: Path) -> None:
    store = SqliteQueueStore(directory)

    async def submit() -> None:
        while True:
            job_id = new_id("job")
            await store.submit(a_job(job_id), NO_LIMITS)
            os.write(1, f"{job_id}\n".encode())

    await asyncio.gather(*(submit() for _ in range(AT_ONCE)))


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[2]:
        from tests.mutants.queue import MUTANTS

        MUTANTS[sys.argv[2]]()
    asyncio.run(main(Path(sys.argv[1])))
