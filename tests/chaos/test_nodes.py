"""A budget over two nodes and a Redis that comes and goes: not a cent too much, and in the end everybody agrees.

`HEADGATE_TEST_REDIS_KILLS=30 HEADGATE_TEST_FREEZE_S=60` for the full run; `HEADGATE_TEST_SEED` replays one.
"""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support import limit_burst
from tests.support.gateway_process import Gateway
from tests.support.limit_burst import BUDGET, DOLLAR, burst, limit_of, one_by_one
from tests.support.nodes import Clients, agreement, quantile, two_nodes, worker_pids
from tests.support.redis_server import RedisServer
from tests.support.upstream_thread import BlockingUpstream, UpstreamThread

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
CLIENTS = 200
REDIS_KILLS = int(os.environ.get("HEADGATE_TEST_REDIS_KILLS", "2"))
FREEZE_S = float(os.environ.get("HEADGATE_TEST_FREEZE_S", "3"))
# Requests ask for it each time, and go on without it; the budget is what must hold.
ASKED = {"scope": "key:*", "requests": 1_000_000, "per": "60s", "exact": True, "when_away": "local"}


@pytest.fixture(scope="module")
def upstream() -> Iterator[BlockingUpstream]:
    with UpstreamThread() as thread:
        yield thread.start()


@pytest.fixture
def redis_server(tmp_path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path / "redis", appendonly="yes", appendfsync="everysec") as server:
        yield server


def prepare(upstream: BlockingUpstream) -> None:
    print(f"HEADGATE_TEST_SEED={SEED}")
    upstream.clear()
    upstream.script("chat", limit_burst.costly(SEED))


@pytest.mark.parametrize("is_exact", [True, False], ids=["exact", "default"])
async def test_a_dollar_is_a_dollar_for_two_hundred_clients_of_two_nodes(
    tmp_path, upstream, redis_server, is_exact
) -> None:
    prepare(upstream)
    rule = BUDGET | {"exact": is_exact}
    async with two_nodes(tmp_path, redis_server, upstream, limits={"rules": [rule]}) as pair:
        statuses = await burst([gateway.port for gateway in pair], CLIENTS)
        assert set(statuses) == {200, 429}
        tail = [await one_by_one(gateway.port) for gateway in pair]
        spent, stands, ledgers = await agreement(redis_server, pair, (limit_of(rule), "tests"), within_s=60)
        reports = [await asyncio.to_thread(gateway.manage, "/api/costs?by=team") for gateway in pair]
    print(f"{statuses.count(200)} + {sum(tail)} admitted, spent {spent} of {DOLLAR}")
    assert spent <= DOLLAR * (1 if is_exact else 1.01)
    assert spent > 0.9 * DOLLAR, "much of the budget could not be had"
    assert (stands.spent, stands.held) == (spent, 0), (
        "reservations of nobody, or another sum than the ledger's"
    )
    assert ledgers[0] == ledgers[1]
    assert [report["total"]["cost_nanousd"] for report in reports] == [spent, spent]
    assert {len(ledger) for ledger in ledgers} == {CLIENTS + sum(tail) + 2}


@pytest.mark.parametrize("mutant", ["counts_in_redis_for_each_worker", "checks_then_adds_in_redis"])
async def test_builds_that_multiply_the_budget_are_caught(tmp_path, upstream, redis_server, mutant) -> None:
    prepare(upstream)
    async with two_nodes(
        tmp_path,
        redis_server,
        upstream,
        limits={"rules": [BUDGET | {"exact": True}]},
        module="tests.mutants.gateway",
        environ={"HEADGATE_TEST_MUTANT": mutant},
    ) as pair:
        await burst([gateway.port for gateway in pair], CLIENTS)
        spent = 0
        for gateway in pair:
            rows = await asyncio.to_thread(gateway.rows, CLIENTS // 2)
            spent += sum(row["cost_nanousd"] or 0 for row in rows if not row["node"])
    assert spent > 1.01 * DOLLAR


@pytest.mark.parametrize("mutant", ["", "fills_with_nothing"], ids=["product", "mutant"])
async def test_what_redis_forgot_is_known_from_the_ledger(tmp_path, upstream, redis_server, mutant) -> None:
    prepare(upstream)
    broken = (
        {"module": "tests.mutants.gateway", "environ": {"HEADGATE_TEST_MUTANT": mutant}} if mutant else {}
    )
    async with two_nodes(tmp_path, redis_server, upstream, limits={"rules": [BUDGET]}, **broken) as pair:
        ports = [gateway.port for gateway in pair]
        await burst(ports, 40)
        for gateway in pair:
            await asyncio.to_thread(gateway.rows, 20)
        await asyncio.to_thread(redis_server.command, "FLUSHALL")
        deadline = time.monotonic() + 30
        while (
            "".join(g.log() for g in pair).count("told from the ledger") < 2 and time.monotonic() < deadline
        ):
            await asyncio.sleep(0.1)
        while 503 in await burst(ports, 8) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        statuses = await burst(ports, 40)
        for gateway in pair:
            await asyncio.to_thread(gateway.rows, 40)
        ended = [await asyncio.to_thread(gateway.rows) for gateway in pair]
    assert 503 not in statuses, "it was not filled"
    spent = sum(row["cost_nanousd"] or 0 for rows in ended for row in rows if not row["node"])
    assert (spent > 1.01 * DOLLAR) == bool(mutant)


async def storm(pair, redis_server: RedisServer, chance: random.Random) -> list[tuple[str, float, float]]:
    """Everything that happens to Redis and to workers, in a seeded order. What, from when, to when."""
    troubles = ["kill"] * REDIS_KILLS + ["freeze", "flush", "node"] + ["worker"] * max(2, REDIS_KILLS // 5)
    chance.shuffle(troubles)
    told = []
    for trouble in troubles:
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        began_at = time.perf_counter()
        if trouble == "kill":
            await asyncio.to_thread(redis_server.kill)
            await asyncio.sleep(chance.uniform(0.0, 1.5))
            await asyncio.to_thread(redis_server.start)
        elif trouble == "freeze":
            redis_server.freeze()
            await asyncio.sleep(FREEZE_S)
            redis_server.thaw()
        elif trouble == "flush":
            await asyncio.to_thread(redis_server.command, "FLUSHALL")
            await asyncio.sleep(5.0)
        elif trouble == "node":
            await asyncio.to_thread(restart, chance.choice(pair))
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(chance.choice(worker_pids(chance.choice(pair))), signal.SIGKILL)
        told.append((trouble, began_at, time.perf_counter()))
    return told


def restart(gateway: Gateway) -> None:
    """kill -9 of a whole node, parent and workers, and its next start."""
    workers = worker_pids(gateway)
    gateway.kill()
    for pid in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    gateway.start()


async def test_a_budget_holds_and_all_agree_however_redis_comes_and_goes(
    tmp_path, upstream, redis_server, capsys
) -> None:
    prepare(upstream)
    chance = random.Random(SEED)
    budget = BUDGET | {"usd": round(REDIS_KILLS * 2.5 + FREEZE_S + 10)}
    rules = [budget, ASKED]
    async with two_nodes(tmp_path, redis_server, upstream, limits={"rules": rules}, timeout_ms=100) as pair:
        clients = Clients([gateway.port for gateway in pair], 16)
        told = await storm(pair, redis_server, chance)
        answers = await clients.stop()
        spent, stands, ledgers = await agreement(
            redis_server, pair, (limit_of(budget), "tests"), within_s=120
        )
        metrics = [await asyncio.to_thread(gateway.metrics) for gateway in pair]
        logs = "".join(gateway.log() for gateway in pair)
    calm, first, later = phases(answers, told)
    with capsys.disabled():
        statuses = dict(Counter(answer.status for answer in answers))
        print(
            f"\nHEADGATE_TEST_SEED={SEED}: {dict(Counter(trouble for trouble, _, _ in told))}, answers {statuses}"
        )
        for name, lasted in (("calm", calm), ("away < 0.3 s", first), ("away", later)):
            p50, p99 = quantile(lasted, 0.5) * 1000, quantile(lasted, 0.99) * 1000
            print(
                f"  {name}: {len(lasted)} answers, p50 {p50:.1f} ms, p99 {p99:.1f} ms, most {max(lasted, default=0) * 1000:.0f} ms"
            )
        away = sum(m["headgate_limit_store_absences_total"] for m in metrics)
        fills = logs.count("was told from the ledger")
        print(f"  spent {spent / DOLLAR:.3f} of ${budget['usd']}, absences {away:.0f}, fills {fills:.0f}")
    assert ledgers[0] == ledgers[1], "the nodes' ledgers differ"
    assert (stands.spent, stands.held) == (spent, 0)
    assert spent <= budget["usd"] * DOLLAR * 1.01
    assert {answer.status for answer in answers} <= {0, 200, 429, 503}
    assert max(answer.lasted_s for answer in answers) < 10, "somebody hung"
    assert "Traceback" not in logs
    assert fills >= 2, "at the start and after FLUSHALL"


def phases(answers, told) -> tuple[list[float], list[float], list[float]]:
    """How long answers took: in calm, just after Redis froze, and while it stayed away. The upstream takes up to 0.3 s."""
    calm, first, later = [], [], []
    for answer in answers:
        trouble = next((t for t in told if t[1] - 0.5 <= answer.sent_at <= t[2] + 0.5), None)
        if trouble is None:
            calm.append(answer.lasted_s)
        elif trouble[0] == "freeze" and trouble[1] <= answer.sent_at <= trouble[2]:
            (first if answer.sent_at < trouble[1] + 0.3 else later).append(answer.lasted_s)
    return calm, first, later
