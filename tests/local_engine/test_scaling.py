"""How many replicas: reasons must hold, one step at a time, bounds and the calendar above all."""

from datetime import datetime

import pytest
from pydantic import ValidationError

from local_engine.scaling import PoolLoad, Scaler
from local_engine.supervision_config import ScaleConfig

MONDAY = datetime(2026, 11, 16, 12, 0)


def load(ready: int, waiting: int = 0, in_flight: int = 1, saturation: float = 0.5) -> PoolLoad:
    return PoolLoad(ready, waiting, in_flight, saturation)


def run(
    scaler: Scaler, current: int, seconds: int, what: PoolLoad, begin: int = 0
) -> list[tuple[int, int, str]]:
    """When it changed, to what, and why."""
    changes = []
    for now in range(begin, begin + seconds):
        decision = scaler.decide(current, what, float(now), MONDAY)
        if decision.replicas != current:
            changes.append((now, decision.replicas, decision.reason))
            current = decision.replicas
            what = what._replace(ready=current)
    return changes


def test_a_queue_that_stays_brings_one_more_and_then_another():
    scaler = Scaler(ScaleConfig(min=1, max=3, waiting=4, up_after_s=10))
    assert run(scaler, 1, 60, load(1, waiting=40)) == [(10, 2, "waiting"), (21, 3, "waiting")]


def test_a_short_queue_or_a_short_moment_does_not():
    scaler = Scaler(ScaleConfig(min=1, max=3, waiting=4, up_after_s=10))
    assert run(scaler, 2, 60, load(2, waiting=7)) == []
    for now in range(100):
        what = load(2, waiting=20 if now % 9 else 0)
        assert scaler.decide(2, what, float(now), MONDAY).replicas == 2


def test_one_that_is_starting_is_help_under_way():
    scaler = Scaler(ScaleConfig(min=1, max=3, up_after_s=0))
    assert scaler.decide(2, load(1, waiting=100), 0.0, MONDAY).replicas == 2


def test_full_ones_bring_one_more_too():
    scaler = Scaler(ScaleConfig(min=1, max=2, saturation=0.8, up_after_s=5))
    assert run(scaler, 1, 20, load(1, saturation=0.85)) == [(5, 2, "saturation")]


def test_one_goes_when_the_others_would_still_be_idle_and_not_before():
    settings = ScaleConfig(min=1, max=4, idle_saturation=0.3, down_after_s=300)
    assert run(Scaler(settings), 3, 400, load(3, saturation=0.25)) == []  # two would be at 0.375
    assert run(Scaler(settings), 3, 400, load(3, saturation=0.15)) == [(300, 2, "idle")]
    assert run(Scaler(settings), 3, 400, load(3, waiting=1, saturation=0.1)) == []


def test_it_does_not_come_and_go():
    """After one went, what is left is not so full that it would come back."""
    settings = ScaleConfig(min=1, max=4, up_after_s=0, down_after_s=0)
    scaler = Scaler(settings)
    current, changes = 4, 0
    for now in range(200):
        decision = scaler.decide(
            current, load(current, saturation=min(1.0, 1.1 / current)), float(now), MONDAY
        )
        changes += decision.replicas != current
        current = decision.replicas
    assert changes <= 1


def test_the_last_one_goes_after_a_while_without_any_request_and_comes_back_for_one():
    settings = ScaleConfig(min=0, max=2, zero_after_s=900)
    idle = load(1, in_flight=0, saturation=0.0)
    scaler = Scaler(settings)
    assert run(scaler, 1, 899, idle) == []
    assert scaler.decide(1, load(1, in_flight=1), 899.0, MONDAY).replicas == 1
    assert run(scaler, 1, 1200, idle, begin=900) == [(1800, 0, "unused")]
    assert scaler.decide(0, load(0, waiting=0, in_flight=0), 3000.0, MONDAY).replicas == 0
    assert scaler.decide(0, load(0, waiting=1, in_flight=0), 3001.0, MONDAY) == (1, "waiting")
    assert run(Scaler(ScaleConfig(min=1, max=2)), 1, 5000, idle) == []


def test_one_that_was_woken_and_starts_is_not_unused_yet():
    scaler = Scaler(ScaleConfig(min=0, max=2, zero_after_s=10))
    idle = load(1, in_flight=0, saturation=0.0)
    assert run(scaler, 1, 12, idle) == [(10, 0, "unused")]
    for now in range(100, 160):  # woken, and its requests are not in the figures yet
        assert scaler.decide(1, load(0, in_flight=0), float(now), MONDAY).replicas == 1
    assert run(scaler, 1, 12, idle, begin=160) == [(170, 0, "unused")]


def test_the_calendar_has_bounds_of_its_own():
    settings = ScaleConfig.model_validate(
        {
            "min": 0,
            "max": 4,
            "schedule": [
                {"days": ["mon"], "start": "08:00", "end": "19:00", "min": 2},
                {"days": ["sun"], "start": "22:00", "end": "06:00", "max": 1},
            ],
        }
    )
    scaler = Scaler(settings)
    assert scaler.bounds(MONDAY) == (2, 4)
    assert scaler.bounds(MONDAY.replace(hour=19)) == (0, 4)
    assert scaler.bounds(MONDAY.replace(hour=5, minute=59)) == (0, 1)  # what began on Sunday
    assert scaler.bounds(MONDAY.replace(hour=6)) == (0, 4)
    assert scaler.bounds(MONDAY.replace(day=15, hour=22)) == (0, 1)
    assert scaler.decide(0, load(0, in_flight=0), 0.0, MONDAY) == (2, "schedule")
    late = MONDAY.replace(day=15, hour=23)
    assert scaler.decide(3, load(3), 0.0, late) == (1, "schedule")


@pytest.mark.parametrize(
    "values",
    [
        {"min": 3, "max": 2},
        {"max": 2, "schedule": [{"start": "08:00", "end": "09:00", "min": 3}]},
        {"max": 2, "schedule": [{"start": "8:00", "end": "09:00"}]},
        {"max": 2, "saturation": 0.3, "idle_saturation": 0.4},
    ],
)
def test_bounds_that_cannot_be_are_refused(values):
    with pytest.raises(ValidationError):
        ScaleConfig.model_validate(values)
