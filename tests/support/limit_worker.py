"""A process that admits and settles as a worker does, without HTTP: many of them fit one machine.

    python -m tests.support.limit_worker DIRECTORY REQUESTS [MUTANT]

It says `ready`, waits for a line, admits as fast as it may, says how many tokens it was granted, waits for the end
of its input, and goes.
"""

import asyncio
import secrets
import sys
import time
from pathlib import Path

from backends.dialect import CHAT
from gateway.leases import Leases
from gateway.stores.limit_sqlite import SqliteLimitStore
from policies.exchange import Caller, Exchange
from policies.limits.book import LimitBook
from policies.limits.holding import Holding
from policies.limits.limit import Limit, Scope, Window
from policies.limits.policy import Limits
from policies.routing import Model

LIMIT = Limit("tokens-60s", Scope("key"), "tokens", 100, Window("rolling", 60))
TOKENS = 7  # of one request: six of body, at four bytes each, and one of output


async def main(directory: Path, requests: int) -> None:
    holding = Holding(lambda: secrets.token_hex(4))
    leases = Leases(lambda: SqliteLimitStore(directory), holding)
    policy = Limits(LimitBook([LIMIT]), holding, leases.wake)
    leases.start()
    caller, model = Caller("k", "k"), Model("m", ())
    loop = asyncio.get_running_loop()
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    granted = 0

    async def ask(number: int) -> None:
        nonlocal granted
        exchange = Exchange(
            str(number),
            CHAT,
            time.perf_counter(),
            time.time(),
            caller=caller,
            model=model,
            body_bytes=20,
            max_tokens=1,
        )
        denial = policy.admit(exchange, time.perf_counter())
        if denial is None and exchange.lacks:
            denial = await leases.obtain(exchange)
        if denial is None:
            granted += sum(units for _, units in exchange.taken)
            exchange.dispatched_at = time.perf_counter()  # and nobody knows what it used
        policy.settle(exchange, time.perf_counter())

    await asyncio.gather(*map(ask, range(requests)))
    print(granted, flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    await leases.stop()


async def run_workers(directory: Path, processes: int, requests: int, mutant: str = "") -> list[int]:
    """So many of these processes, all let go at one moment; the tokens each was granted."""
    command = (sys.executable, "-m", "tests.support.limit_worker", str(directory), str(requests), mutant)
    pipe = asyncio.subprocess.PIPE
    running = [
        await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe) for _ in range(processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert await process.stdout.readline() == b"ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
        return [int(await process.stdout.readline()) for process in running if process.stdout is not None]
    finally:
        for process in running:
            if process.stdin is not None:
                process.stdin.close()
            await process.wait()


if __name__ == "__main__":
    if len(sys.argv) > 3 and sys.argv[3]:
        from tests.mutants.limits import MUTANTS

        MUTANTS[sys.argv[3]]()
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
