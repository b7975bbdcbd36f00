"""How much a request is taken to use, before anybody knows: the units it reserves of each measure.

Tokens of input from the bytes of the body, of output from what the request allows itself, money at the dearest of
the targets it may reach. `strict` never says too little where the request names its output (a byte-level vocabulary has
no token of less than a byte); else four bytes are a token, as in every estimate of ours, with a tenth on top.
Settlement makes it true.
"""

from typing import Final

from policies.exchange import Exchange
from policies.rate_card import Rates
from policies.routing import Model
from policies.rules.fallback import models_after

DEFAULT_OUTPUT_TOKENS: Final = 1024
MILLION: Final = 1_000_000
_MAX_INPUT_TOKENS: Final = 2_000_000  # no model reads more; a body may hold images


def tokens(exchange: Exchange, default_output_tokens: int, *, is_strict: bool) -> tuple[int, int]:
    """Input and output a request may use."""
    body_bytes = exchange.body_bytes
    given = body_bytes if is_strict else body_bytes * 11 // 40 + 1
    dialect = exchange.dialect
    if not dialect.is_billed:
        return 0, 0
    output = 0
    if dialect.name != "embeddings":
        asked = exchange.max_tokens
        output = (default_output_tokens if asked is None else asked) * exchange.choices
    return min(given, _MAX_INPUT_TOKENS), output


def money_nanousd(
    exchange: Exchange, model: Model, input_tokens: int, output_tokens: int, *, is_strict: bool
) -> int | None:
    """What so many tokens cost at the dearest target of the model and of those that may answer in its place, rounded up.

    None: no target's price is known.

    `is_strict` takes every token for the dearest kind there is: written to a cache, audio, reasoning.
    """
    dearest: int | None = None
    models = (model,) if model.routing is None else models_after(model)
    for target in (target for each in models for target in each.targets):
        price = target.price
        if price.card is None:
            if price.kind == "free" and dearest is None:
                dearest = 0
            continue
        rates = price.card.rates(input_tokens, exchange.service_tier, exchange.received_time)
        if rates is None:
            continue
        given, answer, request = _taken_for(rates, is_strict=is_strict)
        cost = -(-(input_tokens * given + output_tokens * answer + request) // MILLION)
        if dearest is None or cost > dearest:
            dearest = cost
    return dearest


def flat_rates(model: Model, *, is_strict: bool) -> tuple[int, int, int] | None:
    """Rates of input, output and request that no target exceeds, if they depend on nothing; None: ask `money_nanousd`."""
    found = []
    for target in model.targets:
        rates = None if target.price.card is None else target.price.card.flat
        if rates is None:
            return None
        found.append(_taken_for(rates, is_strict=is_strict))
    return (max(r[0] for r in found), max(r[1] for r in found), max(r[2] for r in found)) if found else None


def _taken_for(rates: Rates, *, is_strict: bool) -> tuple[int, int, int]:
    given, answer = rates.input, rates.output
    if is_strict:
        given = max(given, rates.cache_write_5m, rates.cache_write_1h, rates.input_audio)
        answer = max(answer, rates.reasoning, rates.output_audio)
    return given, answer, rates.request
