"""A limit's no, in words and in figures. One sentence says which limit, where it stands, and what would help."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Final

from policies.exchange import Exchange
from policies.limits.account import Account
from policies.limits.messages import Refusal
from policies.routing import Model
from policies.verdict import Denial, Refused

BUDGET_EXCEEDED: Final = "budget_exceeded"
_BRIEF_S: Final = 1.0  # a moment: what others hold comes back when their requests end
# Not by name: an organisation's is nothing that each of its keys need know.
_WHOSE: Final = {
    "org": "your organisation",
    "team": "your team",
    "key": "this key",
    "user": "this end user",
    "model": "this model",
    "tag": "this tag",
}
_NOUNS: Final = {
    "requests": "requests",
    "tokens": "tokens",
    "input_tokens": "tokens of input",
    "output_tokens": "tokens of output",
    "concurrent_requests": "requests at once",
    "concurrent_streams": "streams at once",
}


def refuse(account: Account, requested: int, refusal: Refusal, now_us: int) -> Denial:
    """429 by this account's limit; 503 when the store that could say is away."""
    if refusal.is_away:
        return unavailable()
    limit = account.limit
    resets_time = refusal.fits_at_us / 1e6 if refusal.fits_at_us else None
    fits = requested <= (limit.burst or limit.amount)
    retry_after_s: float | None = None
    if refusal.fits_at_us:
        retry_after_s = max(0.001, (refusal.fits_at_us - now_us) / 1e6)
    elif fits and refusal.held and requested <= limit.amount - refusal.spent:
        retry_after_s = _BRIEF_S
    refused = Refused(
        limit=limit.name,
        level=limit.scope.level,
        scope=account.member,
        measure=limit.measure,
        amount=limit.amount,
        spent=refusal.spent,
        reserved=refusal.held,
        requested=requested,
        resets_time=resets_time,
    )
    if limit.measure == "money":
        code = BUDGET_EXCEEDED
    else:
        code = "concurrency_limit_exceeded" if account.is_slots else "rate_limit_exceeded"
    return Denial(429, code, _message(refused, fits=fits), retry_after_s=retry_after_s, refused=refused)


def _message(refused: Refused, *, fits: bool) -> str:
    measure = refused.measure
    used = f"{_amount(measure, refused.spent)} spent and {_amount(measure, refused.reserved)} reserved"
    asks = f"this request reserves {_amount(measure, refused.requested)}"
    message = (
        f"the limit `{refused.limit}` of {_WHOSE[refused.level]} is reached: {used} of "
        f"{_amount(measure, refused.amount)}{_unit(measure)}, and {asks}"
    )
    if not fits and refused.amount:
        return f"{message}, more than the limit ever allows: send less, or allow fewer tokens of output"
    if refused.resets_time is not None:
        resets = datetime.fromtimestamp(refused.resets_time, UTC).isoformat(timespec="seconds")
        return f"{message}; it would fit from {resets.replace('+00:00', 'Z')}"
    return message


def _amount(measure: str, units: int) -> str:
    if measure == "money":
        return f"${Decimal(units).scaleb(-9).quantize(Decimal('0.000001'))}"
    return f"{units:,}"


def _unit(measure: str) -> str:
    noun = _NOUNS.get(measure)
    return f" {noun}" if noun else ""


def unavailable() -> Denial:
    """The store of limits is away, and nothing here says that requests may go on without it."""
    return Denial(
        503,
        "limits_unavailable",
        "limits cannot be checked at the moment; send the request again",
        retry_after_s=_BRIEF_S,
    )


def not_priced(model: Model) -> Denial:
    return Denial(
        403,
        "price_unknown",
        f"the model `{model.name}` has no price here, so it cannot be used under a budget; "
        "its operator can give it one under `prices.overrides` or `models`",
        param="model",
    )


def not_metered(exchange: Exchange) -> Denial:
    return Denial(
        403,
        "not_metered",
        f"`{exchange.model_name}` is passed through unread, so it cannot be used under a limit of tokens or money",
    )
