import json
import random
from collections import defaultdict
from datetime import UTC, datetime

import pytest

from gateway.ledger_row import LedgerRow
from gateway.spend import Period, Spend, dollars, export, moment_us, spend_by, total_spend
from gateway.stores import ledger_table
from gateway.stores.sqlite import DATABASE_NAME, database
from tests.support.ledger_rows import a_row

DAY_US = 86_400_000_000
START_US = 1_793_059_200_000_000  # a midnight, UTC
KEYS = {
    "team": "team",
    "organisation": "organisation",
    "user": "end_user",
    "model": "requested_model",
    "provider": "provider",
}


@pytest.fixture
def connection(tmp_path):
    with database(tmp_path / DATABASE_NAME) as connection:
        yield connection


def random_rows(count: int) -> list[LedgerRow]:
    chance = random.Random(7)
    rows = []
    for n in range(count):
        key = chance.randrange(4)
        is_unknown = chance.random() < 0.1
        rows.append(
            a_row(
                f"r{n}",
                received_time_us=START_US + chance.randrange(3 * DAY_US),
                key_id=f"k{key}",
                key_name=f"key {key}",
                team=chance.choice(["", "a", "b"]),
                organisation=chance.choice(["", "acme"]),
                end_user=chance.choice(["", "acme/ada", "acme/bob"]),
                requested_model=chance.choice(["demo", "gpt-5-mini", "[red]odd"]),
                provider=chance.choice(["openai", "anthropic"]),
                session_hash=chance.choice([0, 5, -(2**62)]),
                tags=json.dumps(chance.sample(["x", "y", "z"], chance.randrange(3))),
                status=chance.choice([200, 200, 200, 429, 502]),
                ended=chance.choice(["completed", "completed", "client_gone", "incomplete", "interrupted"]),
                input_tokens=None if is_unknown else chance.randrange(10**5),
                cache_read_tokens=None if is_unknown else chance.randrange(10**5),
                cache_write_5m_tokens=None if is_unknown else chance.randrange(100),
                cache_write_1h_tokens=None if is_unknown else chance.randrange(100),
                output_tokens=None if is_unknown else chance.randrange(10**4),
                is_estimated=chance.random() < 0.1,
                cost_nanousd=None if is_unknown else chance.randrange(10**15),
                saved_nanousd=None if is_unknown else chance.randrange(-(10**9), 10**12),
            )
        )
    return rows


def summed(group: str, rows: list[LedgerRow]) -> Spend:
    """The same sums, written again in Python."""
    known = [row for row in rows if row.cost_nanousd is not None]
    return Spend(
        group,
        len(rows),
        sum(row.status >= 400 or row.ended in {"incomplete", "interrupted"} for row in rows),
        sum(
            r.input_tokens + r.cache_read_tokens + r.cache_write_5m_tokens + r.cache_write_1h_tokens
            for r in known
        ),
        sum(row.cache_read_tokens for row in known),
        sum(row.output_tokens for row in known),
        sum(row.cost_nanousd for row in known),
        sum(row.saved_nanousd for row in known),
        len(rows) - len(known),
        sum(row.is_estimated and row.ended != "interrupted" for row in rows),
        sum(row.ended == "interrupted" for row in rows),
    )


def groups_of(by: str, row: LedgerRow) -> list[str]:
    if by == "key":
        return [row.key_name]
    if by == "tag":
        return json.loads(row.tags) or [""]
    if by == "session":
        return [f"{row.session_hash % 2**64:016x}" if row.session_hash else ""]
    if by == "day":
        return [datetime.fromtimestamp(row.received_time_us // 10**6, UTC).strftime("%Y-%m-%d")]
    return [getattr(row, KEYS[by])]


@pytest.mark.parametrize(
    "by", ["key", "team", "organisation", "user", "model", "session", "tag", "day", "provider"]
)
@pytest.mark.parametrize("period", [Period(), Period(START_US + DAY_US // 2, START_US + 2 * DAY_US)])
def test_sums_are_right_to_the_nano_dollar_by_every_grouping(connection, by, period) -> None:
    rows = random_rows(1500)
    ledger_table.insert(connection, rows)
    inside = [row for row in rows if period.since_us <= row.received_time_us < period.until_us]
    grouped = defaultdict(list)
    for row in inside:
        for group in groups_of(by, row):
            grouped[group].append(row)
    expected = {group: summed(group, members) for group, members in grouped.items()}
    found = spend_by(connection, by, period)
    assert {spend.group: spend for spend in found} == expected
    if by == "day":
        assert [spend.group for spend in found] == sorted(expected)
    else:
        costs = [spend.cost_nanousd for spend in found]
        assert costs == sorted(costs, reverse=True)
    assert total_spend(connection, period) == summed("total", inside)


def test_an_empty_ledger_sums_to_zero(connection) -> None:
    assert spend_by(connection, "key", Period()) == []
    assert total_spend(connection, Period()) == Spend("total", *[0] * 10)


def test_sums_beyond_nine_thousand_dollars_stay_exact(connection) -> None:
    ledger_table.insert(connection, [a_row(f"r{n}", cost_nanousd=2**53 + n) for n in range(3)])
    assert total_spend(connection, Period()).cost_nanousd == 3 * 2**53 + 3


@pytest.mark.parametrize("count", [0, 1, 2000, 2001, 4567])
def test_an_export_has_every_row_once_in_order_of_time(connection, count) -> None:
    chance = random.Random(count)
    # Few different times: pages end in the middle of rows of one moment.
    rows = [a_row(f"r{n}", received_time_us=START_US + chance.randrange(5)) for n in range(count)]
    ledger_table.insert(connection, rows)
    found = list(export(connection, Period()))
    assert sorted(found, key=lambda row: row.request_id) == sorted(rows, key=lambda row: row.request_id)
    times = [row.received_time_us for row in found]
    assert times == sorted(times)
    half = list(export(connection, Period(START_US + 1, START_US + 3)))
    assert len(half) == sum(START_US + 1 <= time_us < START_US + 3 for time_us in times)


def test_an_export_does_not_keep_the_database_busy(connection, tmp_path) -> None:
    ledger_table.insert(connection, [a_row(f"r{n}") for n in range(4001)])
    rows = export(connection, Period())
    next(rows)
    with database(tmp_path / DATABASE_NAME) as other:
        assert other.wal_checkpoint(mode=3)[0] >= 0  # TRUNCATE: refused while a reader is inside
    assert sum(1 for _ in rows) == 4000


@pytest.mark.parametrize(
    ("nanousd", "shown"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (12_345, "$0.000012345"),
        (10_000_000, "$0.01"),
        (500_000_000, "$0.50"),
        (1_234_500_000_000, "$1,234.50"),
        (-250_000_000, "-$0.25"),
        (2**63 - 1, "$9,223,372,036.854775807"),
    ],
)
def test_dollars_are_shown_exactly(nanousd, shown) -> None:
    assert dollars(nanousd) == shown


def test_a_moment_is_a_span_back_a_day_or_a_time() -> None:
    now = datetime(2026, 11, 20, 12, tzinfo=UTC)
    us = int(now.timestamp()) * 10**6
    assert moment_us("24h", now) == us - DAY_US
    assert moment_us("7d", now) == us - 7 * DAY_US
    assert moment_us("30m", now) == us - 1_800_000_000
    assert moment_us("2w", now) == us - 14 * DAY_US
    assert moment_us("2026-11-20", now) == us - DAY_US // 2
    assert moment_us("2026-11-20T13:00:00.000001+01:00", now) == us + 1
    for text in ("", "7", "yesterday", "-1d", "2026-13-01"):
        with pytest.raises(ValueError, match="is no time"):
            moment_us(text, now)
