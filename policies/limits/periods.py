"""Calendar days, weeks and months of a time zone, as wall clock microseconds.

Pure: the moment is passed in. A day with a change of clocks is 23 or 25 hours long, as its people live it.
"""

from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

Unit = Literal["day", "week", "month"]


class Calendar(NamedTuple):
    """A unit of the calendar in a time zone (IANA name)."""

    unit: Unit
    zone: str = "UTC"


def edges(calendar: Calendar, at_us: int) -> tuple[int, int, int]:
    """Starts of the period that holds the moment, of the next, and of the one after."""
    first = _first_day(calendar.unit, _day_of(calendar.zone, at_us))
    second = _following(calendar.unit, first)
    third = _following(calendar.unit, second)
    zone = _zone(calendar.zone)
    return _start_us(first, zone), _start_us(second, zone), _start_us(third, zone)


def _day_of(zone: str, at_us: int) -> date:
    return datetime.fromtimestamp(at_us // 1_000_000, UTC).astimezone(_zone(zone)).date()


def _first_day(unit: Unit, day: date) -> date:
    if unit == "week":
        return day - timedelta(days=day.weekday())
    return day.replace(day=1) if unit == "month" else day


def _following(unit: Unit, first: date) -> date:
    if unit == "month":
        return (first.replace(day=28) + timedelta(days=4)).replace(day=1)
    return first + timedelta(days=7 if unit == "week" else 1)


def _start_us(day: date, zone: ZoneInfo) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=zone).timestamp()) * 1_000_000


@lru_cache(maxsize=64)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)
