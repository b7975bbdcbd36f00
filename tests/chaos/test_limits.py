"""Budgets under a burst, over worker processes: not a cent too much, nothing left reserved, and broken builds caught."""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from policies.limits.limit import Limit
from tests.support import limit_burst
from tests.support.gateway_process import Gateway
from tests.support.limit_burst import BUDGET, DOLLAR, burst, limit_of, one_by_one, settled
from tests.support.limit_worker import run_workers
from tests.support.rawcli import RawClient
from tests.support.scripted_answer import Answer
from tests.support.upstream_thread import BlockingUpstream, UpstreamThread

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
CLIENTS = 200


@pytest.fixture(scope="module")
def upstream() -> Iterator[BlockingUpstream]:
    with UpstreamThread() as thread:
        yield thread.start()


@asynccontextmanager
async def serving(
    tmp_path: Path, upstream: BlockingUpstream, mutant: str = "", workers: int = 4, **limits
) -> AsyncIterator[Gateway]:
    environ = {"HEADGATE_TEST_MUTANT": mutant} if mutant else {}
    gateway = Gateway(
        tmp_path,
        workers=workers,
        module="tests.mutants.gateway" if mutant else "gateway",
        environ=environ,
        **limit_burst.budget_config(upstream.url, **limits),
    )
    await asyncio.to_thread(gateway.start)
    try:
        await ready(gateway, workers)
        yield gateway
    finally:
        await asyncio.to_thread(gateway.kill if mutant else gateway.stop)


async def spend(gateway: Gateway, limit: Limit) -> int:
    """What the ledger has after the burst and a tail of single requests."""
    statuses = await burst([gateway.port], CLIENTS)
    assert set(statuses) == {200, 429}, "the burst met no limit, or something else"
    await settled(gateway.directory / "data", (limit, "tests"))
    admitted = statuses.count(200) + await one_by_one(gateway.port)
    rows = await asyncio.to_thread(gateway.rows, CLIENTS + 1 + admitted - statuses.count(200))
    return sum(row["cost_nanousd"] for row in rows)


@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "default"])
async def test_a_dollar_is_a_dollar_for_two_hundred_clients_and_four_workers(
    tmp_path, upstream, is_exact
) -> None:
    print(f"HEADGATE_TEST_SEED={SEED}")
    upstream.clear()
    upstream.script("chat", limit_burst.costly(SEED))
    rule = BUDGET | {"exact": is_exact}
    async with serving(tmp_path, upstream, rules=[rule]) as gateway:
        spent = await spend(gateway, limit_of(rule))
        (stands,) = await settled(tmp_path / "data", (limit_of(rule), "tests"))
    assert spent <= DOLLAR * (1 if is_exact else 1.01)
    assert spent > 0.9 * DOLLAR, "much of the budget could not be had"
    assert (stands.held, stands.spent) == (0, spent), (
        "reservations of nobody, or another sum than the ledger's"
    )
    assert "Traceback" not in gateway.log()


@pytest.mark.parametrize("mutant", ["checks_then_adds", "counts_for_each_worker"])
async def test_builds_that_multiply_the_budget_are_caught(tmp_path, upstream, mutant) -> None:
    upstream.clear()
    upstream.script("chat", limit_burst.costly(SEED))
    async with serving(tmp_path, upstream, mutant, rules=[BUDGET]) as gateway:
        await burst([gateway.port], CLIENTS)
        rows = await asyncio.to_thread(gateway.rows, CLIENTS)
    assert sum(row["cost_nanousd"] for row in rows) > 1.01 * DOLLAR


async def test_a_build_that_keeps_reservations_is_caught(tmp_path, upstream) -> None:
    upstream.clear()
    upstream.script("chat", limit_burst.costly(SEED))
    async with serving(tmp_path, upstream, "never_refunds", workers=1, rules=[BUDGET]) as gateway:
        await burst([gateway.port], 5)
        (stands,) = await settled(tmp_path / "data", (limit_of(BUDGET), "tests"), within_s=1)
    assert stands.held > 0


async def test_a_hundred_tokens_a_minute_are_a_hundred_for_sixteen_processes(tmp_path) -> None:
    admitted = await run_workers(tmp_path, processes=16, requests=10)
    print(f"{sum(admitted)} tokens of 100, by process {admitted}")
    assert 90 <= sum(admitted) <= 100


async def test_a_build_that_checks_then_adds_gives_more_tokens(tmp_path) -> None:
    assert sum(await run_workers(tmp_path, processes=6, requests=30, mutant="checks_then_adds")) > 101


SLOTS = {"scope": "key:*", "concurrent_requests": 6}


@pytest.mark.parametrize("mutant", ["", "forgets_the_dead_never"], ids=["product", "mutant"])
async def test_what_a_killed_worker_held_is_free_again(tmp_path, upstream, mutant) -> None:
    upstream.clear()
    upstream.script("chat", Answer(()).hang_before_head())
    rules = [SLOTS, BUDGET]
    async with serving(tmp_path, upstream, mutant, workers=2, rules=rules, lapse_s=2) as gateway:
        clients = [await RawClient.connect(gateway.port) for _ in range(6)]
        for client in clients:
            await client.send(limit_burst.request())
        await asyncio.to_thread(upstream.wait_for, 6)
        assert await burst([gateway.port], 1) == [429], "six slots are taken"
        os.kill(worker_pids(gateway)[0], signal.SIGKILL)
        for client in clients:
            client.close()
        limits = (limit_of(SLOTS), "config:test"), (limit_of(BUDGET), "tests")
        stands = await settled(tmp_path / "data", *limits, within_s=3 if mutant else 20)
        held = [reading.held for reading in stands]
        assert any(held) if mutant else not any(held)
        if not mutant:
            upstream.clear()
            upstream.script("chat", limit_burst.costly(SEED))
            assert await burst([gateway.port], 6) == [200] * 6


async def test_after_kills_under_load_the_budget_is_what_the_ledger_says(tmp_path, upstream) -> None:
    print(f"HEADGATE_TEST_SEED={SEED}")
    chance = random.Random(SEED)
    upstream.clear()
    upstream.script("chat", limit_burst.costly(SEED))
    budget = BUDGET | {"usd": 1000}
    is_over = asyncio.Event()

    async def client(gateway: Gateway) -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError, EOFError, AssertionError):
                await burst([gateway.port], 1)

    async with serving(tmp_path, upstream, workers=2, rules=[budget], lapse_s=2) as gateway:
        clients = [asyncio.ensure_future(client(gateway)) for _ in range(8)]
        for _ in range(2):
            await asyncio.to_thread(upstream.wait_for, len(upstream.journal) + 10)
            pids = worker_pids(gateway)
            os.kill(chance.choice(pids), signal.SIGKILL)
            await ready(gateway, 2, besides=pids)
        is_over.set()
        await asyncio.gather(*clients)
        deadline = time.monotonic() + 60
        while True:  # the service posts what the dead had not told
            (stands,) = await asyncio.to_thread(
                limit_burst.readings, tmp_path / "data", (limit_of(budget), "tests")
            )
            rows = await asyncio.to_thread(gateway.rows)
            spent = sum(row["cost_nanousd"] or 0 for row in rows)
            if (stands.spent, stands.held) == (spent, 0) or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.2)
    assert (stands.spent, stands.held) == (spent, 0)
    assert any(row["ended"] == "interrupted" for row in rows), "the kills hit nothing"


async def ready(gateway: Gateway, workers: int, besides: Sequence[int] = ()) -> None:
    """Until so many workers serve, not all of them among `besides`."""
    name = 'headgate_workers{state="ready"}'
    async with asyncio.timeout(60):
        while (await asyncio.to_thread(gateway.metrics)).get(name) != workers or set(
            worker_pids(gateway)
        ) <= set(besides):
            await asyncio.sleep(0.05)


def worker_pids(gateway: Gateway) -> list[int]:
    assert gateway.process is not None
    parent = Path(f"/proc/{gateway.process.pid}/task/{gateway.process.pid}/children")
    found = []
    for pid in map(int, parent.read_text().split()):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if b".worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def test_the_budget_of_the_test_is_the_one_of_the_issue() -> None:
    assert json.dumps(BUDGET["usd"]) == "1"
    assert limit_burst.OUTPUT_TOKENS * limit_burst.PRICE["output"] * 1000 == 0.05 * DOLLAR
