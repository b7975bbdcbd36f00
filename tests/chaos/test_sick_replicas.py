"""One of four replicas falls ill, each in its own way: hardly anybody notices, and it is back soon after it is well.

`HEADGATE_TEST_FAULT_S=30` makes every illness last so long, with the health settings that are the defaults (80 s a
case); without it there are fewer, everything that takes its time takes a tenth of it, and the bars that a busy machine
moves are wider. `HEADGATE_TEST_OUTAGE_S=60` is the long form of the outage of all. `HEADGATE_TEST_SEED` replays a run.
"""

import os
import random
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from tests.support.fault_run import REPLICAS, Call, FaultRun

FAULT_S = float(os.environ.get("HEADGATE_TEST_FAULT_S", "0"))
OUTAGE_S = float(os.environ.get("HEADGATE_TEST_OUTAGE_S", "4"))
SEED = int(os.environ.get("HEADGATE_TEST_SEED", random.randrange(10_000)))
QUICK = {"eject_s": 1, "slow_start_s": 1, "probe_every_s": 0.3, "probe_timeout_s": 1}
NOTICED_WITHIN_S, BACK_WITHIN_S, ALARMS = (2.0, 40.0, 0.0) if FAULT_S else (3.5, 4.0, 0.1)
FAIR = 1 / REPLICAS
ILLNESSES = {
    "resets": lambda run: run.faulty("reset"),
    "generation_hangs_while_health_is_ok": lambda run: run.faulty("hang"),
    "ten_times_slower": lambda run: run.slow(10),
    "answers_500": lambda run: run.faulty("status=500"),
    "streams_begin_and_hang": lambda run: run.faulty("hang_after=0"),
    "the_process_hangs": lambda run: run.stopped(),
    "the_process_dies": lambda run: run.dead(),
}

pytestmark = pytest.mark.chaos


# A machine that stands still for so long fails requests by itself; such a run says nothing and is made again.
STILL_S = 0.3
RUNS = 3


def runs(directory) -> Iterator[FaultRun]:
    """The first run in which the machine did not stand still; the last one counts in any case."""
    for number in range(RUNS):
        place = directory / str(number)
        place.mkdir()
        run = FaultRun(place, SEED, health={} if FAULT_S else QUICK)
        yield run
        if run.late_s < STILL_S:
            return


async def fall_ill(run: FaultRun, illness: AbstractContextManager, for_s: float) -> dict[str, float]:
    """Well, ill, well again under load. What the bars are about, by name."""
    await run.load(3.0)
    with illness:
        onset = run.now
        await run.load(for_s)
        healed = run.now
    # Requests sent in the illness may end after it, so that it is over a little later than its load.
    await run.load(BACK_WITHIN_S)
    back = run.now
    await run.load(2.0)
    ill = run.between(onset + NOTICED_WITHIN_S, onset + for_s)
    bad = [call for call in run.calls if not call.is_good]
    under_way = [
        call for call in bad if call.sent_at < onset < call.ended_at
    ]  # had begun: nobody can save them
    moved, others = run.moved(ill)
    return {
        "share": run.share(ill),
        "errors": (len(bad) - len(under_way)) / len(run.calls),
        "moved": moved / others,
        "share_back": run.share(run.between(back, run.now)),
        "amplification": run.amplification(run.calls),
        "requests": len(run.calls),
        "ill_s": healed - onset,
    }


@pytest.mark.parametrize("illness", ILLNESSES if FAULT_S else list(ILLNESSES)[:2])
async def test_18_one_of_four_is_ill_and_hardly_anybody_notices(tmp_path, capsys, illness):
    for each in runs(tmp_path):
        with each as run:
            seen = await fall_ill(run, ILLNESSES[illness](run), FAULT_S or 5.0)
            left = run.left_behind()
            with capsys.disabled():
                print(f"\nHEADGATE_TEST_SEED={SEED} {illness}: {seen}; {run.summary()}")
    assert not (found := faults(seen, left)), f"{found}\n{run.summary()}"


def faults(seen: dict[str, float], left: dict[str, float]) -> list[str]:
    """What is beyond its bar."""
    bars = {
        "share": seen["share"] <= (0.01 if FAULT_S else 0.03),
        "errors": seen["errors"] <= (0.001 if FAULT_S else 0.003),
        "moved": seen["moved"] <= ALARMS,
        "share_back": seen["share_back"] >= 0.6 * FAIR,
        "amplification": seen["amplification"] <= 1.2,
        "left_behind": not left,
    }
    return [f"{name}: {seen.get(name, left)}" for name, is_kept in bars.items() if not is_kept]


async def outage(run: FaultRun, for_s: float) -> tuple[float, list[Call]]:
    """Attempts per request while all four are down, and the requests."""
    await run.load(2.0)
    onset = run.now
    with run.faulty("status=500", tuple(range(REPLICAS))):
        await run.load(for_s)
    during = run.between(onset, run.now)
    return run.amplification(during), during


async def test_19_when_all_are_down_attempts_stay_under_a_fifth_more_than_requests(tmp_path, capsys):
    for each in runs(tmp_path):
        with each as run:
            amplification, during = await outage(run, OUTAGE_S)
            await run.load(BACK_WITHIN_S)
            after = run.between(run.now - 1.0, run.now)
            left = run.left_behind()
            wasted, billed = run.wasted_nanousd()
            with capsys.disabled():
                print(f"\nHEADGATE_TEST_SEED={SEED} all down: {amplification:.3f} attempts; {run.summary()}")
    assert len(during) > 20 * OUTAGE_S
    assert amplification <= 1.2
    assert all(call.status in (500, 502, 503) for call in during)
    assert all(call.is_good for call in after)
    assert left == {}
    assert wasted == 0  # an error is not charged for
    assert billed >= 0


# What each broken build is to be caught by.
MUTANTS = {
    "never_ejects": "answers_500",
    "keeps_the_load_of_failed_attempts": "resets",
    "never_comes_back": "resets",
    "trusts_the_health_page": "generation_hangs_while_health_is_ok",
}


@pytest.mark.parametrize("mutant", MUTANTS if FAULT_S else list(MUTANTS)[:2])
async def test_broken_builds_are_caught(tmp_path, mutant):
    with FaultRun(tmp_path, SEED, health=QUICK, module="tests.mutants.gateway", mutant=mutant) as run:
        seen = await fall_ill(run, ILLNESSES[MUTANTS[mutant]](run), 6.0)
        assert faults(seen, run.left_behind()), f"{mutant} went unnoticed: {seen}"


@pytest.mark.skipif(not FAULT_S, reason="the long form only")
async def test_a_build_that_retries_without_measure_is_caught(tmp_path):
    mutant = {"module": "tests.mutants.gateway", "mutant": "retries_without_measure"}
    with FaultRun(tmp_path, SEED, health=QUICK, **mutant) as run:
        amplification, _ = await outage(run, 6.0)
    assert amplification > 1.2
