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
    """One failed attempt. `reason` is an ErrorKind or a status; `nanousd` is an estimate, None: the price is unknown."""

    endpoint: str
    reason: str
    took_us: int
    nanousd: int | None


def waste_of(exchange: "Exchange", failure: UpstreamError | int, now: float) -> Waste:
    """Of the attempt under way, which has failed."""
    candidate = exchange.candidate
    assert candidate is not None
    nanousd: int | None = 0
    if isinstance(failure, UpstreamError) and failure.sent and exchange.dialect.is_billed:
        usage = estimate_input(exchange.body_bytes)
        charged = charge(usage, candidate.target.price, "", exchange.received_time)
        nanousd = None if charged is None else charged.cost_nanousd
    reason = str(failure) if isinstance(failure, int) else failure.kind
    return Waste(candidate.endpoint.name, reason, int((now - exchange.sent_at) * 1e6), nanousd)


def total_nanousd(waste: list[Waste]) -> int | None:
    """None if any of them is unknown."""
    parts = [each.nanousd for each in waste if each.nanousd is not None]
    return sum(parts) if len(parts) == len(waste) else None
