"""A process that owns jobs and nothing else, told what to do line by line, so that it can be stopped between any two steps.

    python -m tests.support.queue_owner DIRECTORY OWNER MUTANT REDIS

MUTANT and REDIS (its URL; the database and the clock are in DIRECTORY, a node's journal in a folder of it) may be empty. It reads a JSON list a line, `["claim"]`, `["finish", BODY]` (of what it claimed last), `["sweep"]`, and says what came of it.
The store's time is what the test wrote into the file `clock` of the directory.
"""

import asyncio
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from gateway.overflow.job import Claimed
from gateway.overflow.store import LeaseLostError, QueueStore
from gateway.stores.limit_sqlite import Clocks
from gateway.stores.queue_sqlite import SqliteQueueStore
from tests.support.queue_jobs import LANE, an_answer
from tests.support.queue_stores import redis_queue

_TIME = struct.Struct("<q")


class SharedClock:
    """The store's time in microseconds, for several processes."""

    def __init__(self, directory: Path) -> None:
        path = directory / "clock"
        if not path.exists():
            path.write_bytes(_TIME.pack(1_800_000_000_000_000))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), _TIME.size)

    def now_us(self) -> int:
        return int(_TIME.unpack(self._map[:])[0])

    def forward(self, seconds: float) -> None:
        self._map[:] = _TIME.pack(self.now_us() + int(seconds * 1e6))

    @property
    def clocks(self) -> Clocks:
        return Clocks(self.now_us, self.now_us, "boot")


class Owner:
    """The process, from outside. Used by `with`."""

    def __init__(self, directory: Path, name: str, mutant: str = "", redis_url: str = "") -> None:
        self.name = name
        words = (str(directory), name, mutant, redis_url)
        self._command = (sys.executable, "-m", "tests.support.queue_owner", *words)

    def __enter__(self) -> Self:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            self._command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[2]
        )
        return self

    def __exit__(self, *_: object) -> None:
        with self._process:
            self._process.kill()

    def tell(self, *words: Any) -> None:
        """Without waiting for what comes of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(words).encode() + b"\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def ask(self, *words: Any) -> Any:
        self.tell(*words)
        return self.hear()

    def freeze(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self._process.send_signal(signal.SIGCONT)


def store_of(directory: Path, owner: str, redis_url: str) -> QueueStore:
    """As that owner has it; its node is what its name begins with."""
    clock = SharedClock(directory)
    if redis_url:
        return redis_queue(redis_url, directory / owner.partition("/")[0], clock)
    return SqliteQueueStore(directory, clocks=clock.clocks)


async def main(store: QueueStore, owner: str) -> None:
    loop = asyncio.get_running_loop()
    claimed: Claimed | None = None
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        answer: Any
        match json.loads(line):
            case ["claim"]:
                claimed = await store.claim(LANE, owner)
                answer = None if claimed is None else [claimed.job.id, claimed.lease.fence]
            case ["finish", body]:
                assert claimed is not None
                try:
                    await store.finish(claimed.lease, an_answer(body.encode(), ledger_row=body.encode()))
                    answer = "finished"
                except LeaseLostError:
                    answer = "lost"
            case ["sweep"]:
                await store.sweep()
                answer = "swept"
        print(json.dumps(answer), flush=True)
    await store.close()


if __name__ == "__main__":
    where, name, mutant, url = sys.argv[1:]
    if mutant:
        from tests.mutants.queue import MUTANTS

        MUTANTS[mutant]()
    asyncio.run(main(store_of(Path(where), name, url), name))
