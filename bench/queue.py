"""What the queue's stores carry: `python -m bench.queue`. Lifecycles (submit, fair claim, fenced finish, row for the ledger
taken) per second and in CPU time, the time of a submit, the size of the write-ahead log.

Tasks of `--processes` processes hand a job in, claim one and finish it, over and over, as workers of a gateway do; bodies and
answers have 2 KB, four tenants share a lane behind a backlog. Every run prints its table; speed fails none. Bars on two cores: 500 a second in
SQLite and 1,500 in Redis, submit p99 25 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

from bench.machine import describe
from gateway.overflow.job import NewJob, NewParent, Outcome, Result, TenantLimits, new_id
from gateway.overflow.store import QueueStore
from gateway.redis_config import RedisConfig
from gateway.stores.queue_content import Content
from gateway.stores.queue_redis import open_queue
from gateway.stores.queue_sqlite import DATABASE_NAME, SqliteQueueStore

LANE = "bench"
TENANTS = 4
BODY_BYTES = 2048
LIMITS = TenantLimits()
ROW = b"r" * 400


def main() -> int:
    words = argparse.ArgumentParser(prog="python -m bench.queue", description=__doc__)
    words.add_argument("--store", choices=("sqlite", "redis", "both"), default="both")
    words.add_argument("--processes", type=int, default=2, help="that share the store (default 2)")
    words.add_argument("--tasks", type=int, default=16, help="at a time, in each process")
    words.add_argument("--backlog", type=int, default=10_000, help="jobs that wait before it begins")
    words.add_argument("--seconds", type=float, default=10.0)
    words.add_argument(
        "--directory", type=Path, help="where the databases are made (default: a temporary one)"
    )
    words.add_argument("--json", action="store_true", help="figures for programs")
    options = words.parse_args()
    stores = ("sqlite", "redis") if options.store == "both" else (options.store,)
    results = [run(store, options) for store in stores]
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print(", ".join(describe({}).values()))
        for result in results:
            print(table(result))
    return 0


def run(store: str, options: argparse.Namespace) -> dict[str, Any]:
    directory = Path(tempfile.mkdtemp(prefix="headgate-queue-", dir=options.directory))
    server = start_redis(directory) if store == "redis" else None
    port = server[1] if server else 0
    try:
        asyncio.run(fill(directory, port, options.backlog))
        context = multiprocessing.get_context("spawn")
        answers: Any = context.Queue()
        barrier = context.Barrier(options.processes)
        processes = [
            context.Process(
                target=work, args=(directory, port, n, options.tasks, options.seconds, barrier, answers)
            )
            for n in range(options.processes)
        ]
        for process in processes:
            process.start()
        parts = [answers.get(timeout=options.seconds + 120) for _ in processes]
        for process in processes:
            process.join()
        server_cpu_s = cpu_of(server[0].pid) if server else 0.0
        wal = max(part["wal_bytes"] for part in parts)
        return merged(store, parts, server_cpu_s, wal)
    finally:
        if server is not None:
            server[0].kill()
            server[0].wait()
        shutil.rmtree(directory, ignore_errors=True)


def open_store(directory: Path, port: int) -> QueueStore:
    if port:
        return open_queue(RedisConfig(url=f"redis://127.0.0.1:{port}/0"), directory, Content())
    return SqliteQueueStore(directory)


def start_redis(directory: Path) -> tuple[subprocess.Popen[bytes], int]:
    """With the log on disk, synced every second, as operators run it."""
    port = random.randint(20_000, 50_000)
    words = f"--port {port} --bind 127.0.0.1 --dir {directory} --appendonly yes --appendfsync everysec --save"
    server = subprocess.Popen(
        ["redis-server", *words.split(), ""], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(200):
        with_socket = subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True, check=False)
        if with_socket.stdout.strip() == b"PONG":
            return server, port
        time.sleep(0.05)
    raise SystemExit("redis-server did not start")


def a_job(number: int) -> NewJob:
    return NewJob(
        id=new_id("job"),
        tenant=f"t{number % TENANTS}",
        key_id="k",
        lane=LANE,
        model="m",
        path="/v1/chat/completions",
        body=random.randbytes(BODY_BYTES),
        reservation=b"r",
        estimate=500,
    )


async def fill(directory: Path, port: int, backlog: int) -> None:
    store = open_store(directory, port)
    for first in range(0, backlog, 500):
        parent = NewParent(id=new_id("batch"), tenant="t", key_id="k", door="workers_ai", is_finalized=False)
        jobs = [a_job(first + n) for n in range(min(500, backlog - first))]
        await store.submit_all(parent, jobs, LIMITS)
    await store.sweep()
    await store.close()


def work(
    directory: Path, port: int, number: int, tasks: int, seconds: float, barrier: Any, answers: Any
) -> None:
    answers.put(uvloop.run(worked(directory, port, number, tasks, seconds, barrier)))


async def worked(
    directory: Path, port: int, number: int, tasks: int, seconds: float, barrier: Any
) -> dict[str, Any]:
    store = open_store(directory, port)
    await store.stats()
    if port:
        await asyncio.sleep(6)  # in a new epoch nothing is claimed for a few seconds
    barrier.wait()
    owner = f"bench:{number}"
    waits: list[float] = []
    claims: list[float] = []
    counts = {"finished": 0, "settled": 0}
    wal = directory / f"{DATABASE_NAME}-wal"
    largest = 0
    begun_cpu_s, begun_at = cpu_s(), time.perf_counter()
    end_at = begun_at + seconds

    outcome = Outcome(
        state="succeeded",
        result=Result(status=200, headers=b"[]", body=random.randbytes(BODY_BYTES)),
        ledger_row=ROW,
        units=450,
    )

    async def lives() -> None:
        while (begun_at := time.perf_counter()) < end_at:
            await store.submit(a_job(random.randrange(TENANTS)), LIMITS)
            submitted_at = time.perf_counter()
            claimed = await store.claim(LANE, owner)
            claimed_at = time.perf_counter()
            if claimed is not None:
                await store.finish(claimed.lease, outcome)
                counts["finished"] += 1
            waits.append(submitted_at - begun_at)
            claims.append(claimed_at - submitted_at)

    async def settles() -> None:
        nonlocal largest
        while time.perf_counter() < end_at:
            rows = await store.take_settled(owner)
            counts["settled"] += len(await store.ack_settled(rows)) if rows else 0
            largest = max(largest, wal.stat().st_size if wal.exists() else 0)
            await asyncio.sleep(0.1)

    await asyncio.gather(settles(), *(lives() for _ in range(tasks)))
    took_s, used_s = time.perf_counter() - begun_at, cpu_s() - begun_cpu_s
    await store.close()
    return counts | {
        "took_s": took_s,
        "cpu_s": used_s,
        "waits": waits,
        "claims": claims,
        "wal_bytes": largest,
    }


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def cpu_of(pid: int) -> float:
    """Of a process that is still there, since its start."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def merged(store: str, parts: list[dict[str, Any]], server_cpu_s: float, wal: int) -> dict[str, Any]:
    took_s = max(part["took_s"] for part in parts)
    finished = sum(part["finished"] for part in parts)
    submitted = sorted(wait for part in parts for wait in part["waits"])
    claimed = sorted(wait for part in parts for wait in part["claims"])
    lives = finished or 1
    return {
        "store": store,
        "processes": len(parts),
        "lifecycles_per_s": lives / took_s,
        "cpu_us_per_lifecycle": sum(part["cpu_s"] for part in parts) / lives * 1e6,
        "server_cpu_s_in_all": server_cpu_s,
        "submit_p50_ms": at(submitted, 0.5) * 1000,
        "submit_p99_ms": at(submitted, 0.99) * 1000,
        "claim_p99_ms": at(claimed, 0.99) * 1000,
        "wal_mib": wal / 2**20,
    }


def at(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def table(result: dict[str, Any]) -> str:
    figures = {name: value for name, value in result.items() if name != "store"}
    lines = [f"  {name.replace('_', ' '):28} {value:>12,.2f}" for name, value in figures.items()]
    return "\n".join([result["store"], *lines])


if __name__ == "__main__":
    sys.exit(main())
