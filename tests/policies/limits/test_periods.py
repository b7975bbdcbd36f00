"""Calendar periods where people live."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from policies.limits.periods import Calendar, edges

BERLIN = "Europe/Berlin"


def at_us(text: str, zone: str = BERLIN) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()) * 1_000_000


@pytest.mark.parametrize(
    ("unit", "moment", "starts"),
    [
        ("day", "2026-11-20T13:00", ("2026-11-20", "2026-11-21", "2026-11-22")),
        ("day", "2026-11-20T00:00", ("2026-11-20", "2026-11-21", "2026-11-22")),
        ("week", "2026-11-20T13:00", ("2026-11-16", "2026-11-23", "2026-11-30")),
        ("month", "2026-11-30T23:59", ("2026-11-01", "2026-12-01", "2027-01-01")),
        ("month", "2024-01-31T12:00", ("2024-01-01", "2024-02-01", "2024-03-01")),
    ],
)
def test_a_period_begins_at_its_first_local_midnight(unit, moment, starts) -> None:
    assert edges(Calendar(unit, BERLIN), at_us(moment)) == tuple(map(at_us, starts))


def test_days_on_which_clocks_change_have_23_and_25_hours() -> None:
    start, end, _ = edges(Calendar("day", BERLIN), at_us("2026-03-29T12:00"))
    assert (end - start) / 3.6e9 == 23
    start, end, _ = edges(Calendar("day", BERLIN), at_us("2026-10-25T12:00"))
    assert (end - start) / 3.6e9 == 25


def test_the_same_moment_is_another_day_elsewhere() -> None:
    moment = at_us("2026-11-20T23:30", "UTC")
    assert edges(Calendar("day", "Asia/Tokyo"), moment)[0] == at_us("2026-11-21", "Asia/Tokyo")
    assert edges(Calendar("day", "UTC"), moment)[0] == at_us("2026-11-20", "UTC")
