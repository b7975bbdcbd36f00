"""What was spent: the ledger summed by key, team, organisation, end user, model, ..., and its rows exported.

Reads only, and only as much at a time as fits a short read: the gateway's writer is never held up. Unknown cost
stays apart from zero. All days are UTC days.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

import msgspec

from gateway.ledger_row import COLUMNS, LedgerRow
from gateway.stores.sqlite import Connection

GroupBy = Literal["key", "team", "organisation", "user", "model", "session", "tag", "day", "provider", "node"]

# The name that a group is shown by, and what distinguishes it. Of a key that was renamed the latest name counts.
_GROUPS: Final[dict[GroupBy, tuple[str, str]]] = {
    "key": ("max(key_name)", "key_id"),
    "team": ("team", "team"),
    "organisation": ("organisation", "organisation"),
    "user": ("end_user", "end_user"),
    "model": ("requested_model", "requested_model"),
    "session": ("CASE session_hash WHEN 0 THEN '' ELSE printf('%016x', session_hash) END", "session_hash"),
    "tag": ("coalesce(tag.value, '')", "tag.value"),
    "day": ("date(received_time_us / 1000000, 'unixepoch')", "date(received_time_us / 1000000, 'unixepoch')"),
    "provider": ("provider", "provider"),
    "node": ("node", "node"),
}
_SUMS: Final = """
    count(*),
    coalesce(sum(NOT (ended IN ('completed', 'replayed', 'client_gone') AND status < 400)), 0),
    coalesce(sum(input_tokens + cache_read_tokens + cache_write_5m_tokens + cache_write_1h_tokens), 0),
    coalesce(sum(cache_read_tokens), 0),
    coalesce(sum(output_tokens), 0),
    coalesce(sum(cost_nanousd), 0),
    coalesce(sum(saved_nanousd), 0),
    coalesce(sum(cost_nanousd IS NULL), 0),
    coalesce(sum(is_estimated AND ended <> 'interrupted'), 0),
    coalesce(sum(ended = 'interrupted'), 0)
"""
_WHERE: Final = "received_time_us >= ? AND received_time_us < ?"
_UNITS: Final = {
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_FOREVER_US: Final = 2**63 - 1
_PAGE_ROWS: Final = 2000


class Spend(NamedTuple):
    """Sums over one group's requests. Money in nano-dollars, over the rows whose cost is known."""

    group: str  # "" where the requests have none
    requests: int
    errors: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    cost_nanousd: int
    saved_nanousd: int
    unknown_cost: int  # requests
    estimated: int  # requests
    interrupted: int  # requests


class Period(NamedTuple):
    """Wall clock microseconds, `until` excluded."""

    since_us: int = 0
    until_us: int = _FOREVER_US


def moment_us(text: str, now: datetime) -> int:
    """`24h`, `7d`, `30m`, `2w` ago, a day or a time (UTC unless it says otherwise); ValueError with a sentence."""
    ago = re.fullmatch(r"(\d{1,6})([mhdw])", text)
    if ago is not None:
        return _us_of(now - int(ago[1]) * _UNITS[ago[2]])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no time: write 24h, 7d, 2026-11-01 or 2026-11-01T12:00.") from None
    return _us_of(moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC))


def _us_of(moment: datetime) -> int:
    return (moment - datetime.fromtimestamp(0, UTC)) // timedelta(microseconds=1)


def spend_by(connection: Connection, by: GroupBy, period: Period) -> list[Spend]:
    """One Spend per group, the dearest first (days: in order). A request with two tags is in both groups."""
    name, distinct = _GROUPS[by]
    source = "ledger LEFT JOIN json_each(ledger.tags) AS tag" if by == "tag" else "ledger"
    order = "1" if by == "day" else "7 DESC, 2 DESC, 1"
    query = f"SELECT {name}, {_SUMS} FROM {source} WHERE {_WHERE} GROUP BY {distinct} ORDER BY {order}"  # noqa: S608 - own texts
    return [Spend(*row) for row in connection.execute(query, period)]


def total_spend(connection: Connection, period: Period) -> Spend:
    """All requests of the period, each once."""
    query = f"SELECT 'total', {_SUMS} FROM ledger WHERE {_WHERE}"  # noqa: S608 - own texts
    return Spend(*next(iter(connection.execute(query, period))))


def export(connection: Connection, period: Period) -> Iterator[LedgerRow]:
    """The rows in order of their time. Memory stays flat, and no read lasts longer than a page of them."""
    query = (
        f"SELECT {', '.join(COLUMNS)}, rowid FROM ledger "  # noqa: S608 - own names
        f"WHERE (received_time_us, rowid) > (?, ?) AND {_WHERE} ORDER BY received_time_us, rowid LIMIT {_PAGE_ROWS}"
    )
    after = (period.since_us, -1)
    while True:
        page: list[tuple[Any, ...]] = connection.execute(query, (*after, *period)).fetchall()
        for row in page:
            yield msgspec.convert(row, LedgerRow, strict=False)  # SQLite's booleans are 0 and 1
        if len(page) < _PAGE_ROWS:
            return
        after = (page[-1][1], page[-1][-1])


def dollars(nanousd: int) -> str:
    """Exact to the nano-dollar: `$1,234.50`, `$0.000012345`, `-$0.25`."""
    whole, rest = divmod(abs(nanousd), 1_000_000_000)
    digits = f"{rest:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if nanousd < 0 else ''}${whole:,}.{digits}"
