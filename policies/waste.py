"""What failed attempts cost us: never the caller's to pay, and not forgotten.

An attempt that broke off after the request was sent may be on the upstream's bill: at most for the prompt, since
nothing of its answer counts as delivered. Where an upstream answered with an error, it charges nothing.
"""

from typing import TYPE_CHECKING

import msgspec

from backends.errors import UpstreamError
from backends.usage_readers import estimate_input
from policies.cost import charge

if TYPE_CHECKING:
    from policies.exchange import Exchange


class Waste(msgspec.Struct, array_like=True, frozen=True):
    """One failed attempt. `reason` is an ErrorKind, a status, or `unused`; `nanousd` is an estimate, None: the price is unknown."""

    endpoint: str
    reason: str
    took_us: int
    nanousd: int | None


def waste_of(exchange: "Exchange", failure: UpstreamError | int, now: float, endpoint: str = "") -> Waste:
    """Of the attempt under way, which has failed; at its candidate, unless an `endpoint` is named."""
    candidate = exchange.candidate
    assert candidate is not None
    nanousd: int | None = 0
    if isinstance(failure, UpstreamError) and failure.sent and exchange.dialect.is_billed:
        nanousd = _prompt_nanousd(exchange)
    reason = str(failure) if isinstance(failure, int) else failure.kind
    return Waste(endpoint or candidate.endpoint.name, reason, int((now - exchange.sent_at) * 1e6), nanousd)


def unused_prefill(exchange: "Exchange", endpoint: str, took_us: int) -> Waste:
    """Of a prompt that was computed at `endpoint`, and not collected. One that served is no waste, and no row of its own."""
    return Waste(endpoint, "unused", took_us, _prompt_nanousd(exchange))


def _prompt_nanousd(exchange: "Exchange") -> int | None:
    assert exchange.candidate is not None
    usage = estimate_input(exchange.body_bytes)
    charged = charge(usage, exchange.candidate.target.price, "", exchange.received_time)
    return None if charged is None else charged.cost_nanousd


def total_nanousd(waste: list[Waste]) -> int | None:
    """None if any of them is unknown."""
    parts = [each.nanousd for each in waste if each.nanousd is not None]
    return sum(parts) if len(parts) == len(waste) else None
