"""What an answer says of the limits its request was counted by: in each family's own headers, and in a 429's body.

Of several limits of one measure the tightest is told. Never told: whose limit it is by name, and what others have;
a shared limit's own figures are told to all who share it. Only called for requests that a limit applies to.
"""

import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, NamedTuple

from backends.dialect import Family
from policies.exchange import Exchange
from policies.limits.account import Account
from policies.verdict import Refused

Headers = list[tuple[bytes, bytes]]

PREFIXES: Final = (b"x-ratelimit-", b"anthropic-ratelimit-")
_OPENAI: Final = {"requests": b"requests", "tokens": b"tokens"}
_ANTHROPIC: Final = {
    "requests": b"requests",
    "tokens": b"tokens",
    "input_tokens": b"input-tokens",
    "output_tokens": b"output-tokens",
}
_NAMES: Final[dict[Family, dict[str, bytes]]] = {"openai": _OPENAI, "anthropic": _ANTHROPIC}
_STANDS_S: Final = 0.05
_MAX_LINES: Final = 4096
_WARNING: Final = b"x-headgate-limit-warning"


class _Lines(NamedTuple):
    """What an account's answers say, for as long as it may be said again."""

    until_time: float
    remaining: int
    headers: Headers


# Forgotten whole when it is full: an account that is in use is back with the next answer.
_lines: dict[Family, dict[Account, _Lines]] = {"openai": {}, "anthropic": {}}


def limit_headers(exchange: Exchange) -> Headers:
    """For an answer to a request that holds what it took."""
    family = exchange.dialect.family
    names, known = _NAMES[family], _lines[family]
    now_time = time.time()
    tightest: dict[bytes, _Lines] = {}
    warnings: list[str] = []
    for account, _ in exchange.taken:
        limit = account.limit
        if account.is_soft:
            if account.is_over:
                warnings.append(limit.name)
            continue
        name = names.get(limit.measure)
        if name is None:
            continue
        lines = known.get(account)
        if lines is None or now_time >= lines.until_time:
            lines = _say(account, family, name, now_time)
        other = tightest.get(name)
        if other is None or lines.remaining < other.remaining:
            tightest[name] = lines
    headers: Headers = []
    for lines in tightest.values():
        headers += lines.headers
    if warnings:
        headers.append((_WARNING, ", ".join(warnings).encode()))
    return headers


def _say(account: Account, family: Family, name: bytes, now_time: float) -> _Lines:
    """An account's three lines. Where the worker has slack, they stand for a moment: others count there, too."""
    reading, remaining = account.reading, account.remaining
    resets_time = reading.resets_at_us / 1e6 if reading is not None else 0.0
    until_time = now_time + _STANDS_S if account.slack else 0.0
    headers = _named(family, name, account.counter.amount, remaining, resets_time, now_time)
    lines = _Lines(until_time, remaining, headers)
    known = _lines[family]
    if len(known) >= _MAX_LINES:
        known.clear()
    known[account] = lines
    return lines


def refused_headers(family: Family, refused: Refused) -> Headers:
    """For a 429 by a limit."""
    name = (_ANTHROPIC if family == "anthropic" else _OPENAI).get(refused.measure)
    if name is None:
        return []
    remaining = max(0, refused.amount - refused.spent - refused.reserved)
    return _named(family, name, refused.amount, remaining, refused.resets_time or 0.0, time.time())


def refused_details(refused: Refused) -> dict[str, Any]:
    """The figures of a 429, for programs; dollars as decimal text."""
    is_money = refused.measure == "money"

    def written(units: int) -> int | str:
        return _dollars(units) if is_money else units

    return {
        "name": refused.limit,
        "level": refused.level,
        "measure": "usd" if is_money else refused.measure,
        "amount": written(refused.amount),
        "spent": written(refused.spent),
        "reserved": written(refused.reserved),
        "requested": written(refused.requested),
        "resets": None if refused.resets_time is None else _moment(refused.resets_time),
    }


def _named(
    family: Family, name: bytes, amount: int, remaining: int, resets_time: float, now_time: float
) -> Headers:
    if family == "anthropic":
        resets = _moment(max(resets_time, now_time)).encode()
        prefix = b"anthropic-ratelimit-" + name
        return [
            (prefix + b"-limit", b"%d" % amount),
            (prefix + b"-remaining", b"%d" % remaining),
            (prefix + b"-reset", resets),
        ]
    return [
        (b"x-ratelimit-limit-" + name, b"%d" % amount),
        (b"x-ratelimit-remaining-" + name, b"%d" % remaining),
        (b"x-ratelimit-reset-" + name, span_text(resets_time - now_time).encode()),
    ]


def span_text(seconds: float) -> str:
    """As OpenAI writes it: `0s`, `120ms`, `8.64s`, `6m0s`, `1h2m3s`."""
    ms = max(0, round(seconds * 1000))
    if ms < 1000:
        return f"{ms}ms" if ms else "0s"
    if ms < 60_000:
        return f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    minutes, rest_s = divmod(-(-ms // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest_s}s" if hours else f"{minutes}m{rest_s}s"


def _moment(at_time: float) -> str:
    return datetime.fromtimestamp(at_time, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _dollars(nanousd: int) -> str:
    return f"{Decimal(nanousd).scaleb(-9).normalize():f}"
