"""kill -9 at seeded random moments: no request without an end, none entered twice, no amount wrong."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.intents import DIRECTORY_NAME, recover_orphans
from gateway.stores.sqlite import DATABASE_NAME, database
from tests.mutants.ledger import MUTANTS
from tests.support.ledger_rows import rows_in

ROOT = Path(__file__).parents[2]
KILLS = int(os.environ.get("HEADGATE_TEST_KILLS", "30"))

pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    """Where workers come from."""
    command = [sys.executable, "-m", "tests.support.ledger_worker"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        yield running
        running.stdin.close()


def run_and_kill(
    nursery: subprocess.Popen[str], storage: Path, journal: Path, seed: int, mutant: str = ""
) -> None:
    print(json.dumps([str(storage), str(journal), str(seed), mutant]), file=nursery.stdin, flush=True)
    word, pid = nursery.stdout.readline().split()
    assert word == "ready"
    # When to kill, not a wait for something: up to four group commits of the writer.
    time.sleep(random.Random(seed).uniform(0.0, 0.4))
    os.kill(int(pid), signal.SIGKILL)
    assert nursery.stdout.readline() == "gone\n"


def faults(storage: Path, journal: Path) -> list[str]:
    """What the ledger has otherwise than the journal."""
    reached: dict[str, str] = {}
    cost: dict[str, int] = {}
    for line in journal.read_text().splitlines():
        word, request_id, *amount = line.split()
        reached[request_id] = word
        if amount:
            cost[request_id] = int(amount[0])
    rows = rows_in(storage)
    found = [f"{request_id}: a row nobody asked for" for request_id in rows.keys() - reached.keys()]
    for request_id, word in reached.items():
        row = rows.get(request_id)
        if row is None:
            if word != "begin":
                found.append(f"{request_id}: {word}, but there is no row")
        elif row.ended == "interrupted":
            if word == "closed":
                found.append(f"{request_id}: closed, but its row says interrupted")
            if row.cost_nanousd is not None or row.output_tokens is not None:
                found.append(f"{request_id}: interrupted, but its row knows the cost")
        elif word not in {"ending", "closed"} or row.cost_nanousd != cost[request_id]:
            found.append(f"{request_id}: {word}, but its row says {row.ended} for {row.cost_nanousd}")
    return found


def test_killed_workers_leave_every_request_with_one_right_row(nursery, tmp_path) -> None:
    journal = tmp_path / "journal"
    recovered = 0
    for seed in range(KILLS):
        run_and_kill(nursery, tmp_path, journal, seed)
        recovered += recover_orphans(tmp_path)
        with database(tmp_path / DATABASE_NAME) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)], f"seed {seed}"
        assert list((tmp_path / DIRECTORY_NAME).iterdir()) == []
    assert faults(tmp_path, journal) == []
    endings = [row.ended for row in rows_in(tmp_path).values()]
    assert recovered > KILLS, "the kills came too late to leave anything behind"
    assert endings.count("completed") > KILLS
    assert endings.count("interrupted") > 0


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_kill_test_catches_broken_builds(nursery, tmp_path, mutant) -> None:
    journal = tmp_path / "journal"
    for seed in range(100, 130):
        run_and_kill(nursery, tmp_path, journal, seed, mutant)
        recover_orphans(tmp_path)
        if faults(tmp_path, journal):
            return
    pytest.fail(f"{mutant} survived 30 kills unnoticed")
