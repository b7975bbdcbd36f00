"""Another model in place of one that cannot answer: which, and for what failures.

Only while nothing of an answer has been relayed (the send stage sees to that). A chain goes on with the fallbacks of
the model it fell to; a model is tried once. A caller never falls to a model its key may not use, unless the
configuration says so in so many words (`grants`). Knows nothing of retries within a model: `policies.retry` does.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Literal, get_args

import msgspec

from backends.errors import TIMEOUTS, UpstreamError
from policies.access import may_use

if TYPE_CHECKING:
    from policies.exchange import Exchange
    from policies.routing import Model
    from policies.rules.shadow import Shadow
    from policies.rules.split import Split

FailureClass = Literal[
    "error",  # unreachable, broken off, 5xx; our key refused or the model gone there (401, 402, 403, 404)
    "timeout",  # a deadline of ours, or 408 and 504
    "rate_limit",  # 429
    "overload",  # all endpoints full here, or 503 and 529
    "context",  # the prompt does not fit the model's context window
    "budget",  # the caller's budget is used up
]
CLASSES: Final[tuple[FailureClass, ...]] = get_args(FailureClass)
# Statuses that may mean an overflow; the words of the answer tell (backends.overflow).
MAY_BE_OVERFLOW: Final = frozenset({400, 413, 422})
_BY_STATUS: Final[dict[int, FailureClass]] = {
    401: "error",
    402: "error",
    403: "error",
    404: "error",
    408: "timeout",
    429: "rate_limit",
    503: "overload",
    504: "timeout",
    529: "overload",
}


class Fallback(msgspec.Struct, frozen=True):
    """A model to turn to, and when. `grants`: also for callers whose keys may not use it."""

    model: "Model"
    failures: frozenset[str]
    grants: bool = False


class ModelRouting(msgspec.Struct):
    """What the configuration says of one model beyond its targets. `context_tokens` None: its window is not known."""

    split: "Split | None" = None
    fallbacks: tuple[Fallback, ...] = ()
    shadows: tuple["Shadow", ...] = ()
    context_tokens: int | None = None


def class_of(failure: UpstreamError | int) -> FailureClass | None:
    """`failure` is the error, or the status of an answer. None: nothing a fallback is for."""
    if isinstance(failure, UpstreamError):
        return "timeout" if failure.kind in TIMEOUTS else "error"
    return _BY_STATUS.get(failure) or ("error" if failure >= 500 else None)


def has_fallbacks(exchange: "Exchange") -> bool:
    """Whether anything could follow. Cheap: asked of every request."""
    routing = exchange.model.routing if exchange.model is not None else None
    return bool(exchange.fallen_from) or (routing is not None and bool(routing.fallbacks))


def has_shadows(exchange: "Exchange") -> bool:
    """Whether copies of it may be made."""
    routing = exchange.model.routing if exchange.model is not None else None
    return routing is not None and bool(routing.shadows)


def fall_back(exchange: "Exchange", failure: FailureClass) -> bool:
    """Turns the exchange to the next model that is for this failure; False: there is none, and the failure stands."""
    found = next_fallback(exchange, failure)
    if found is None:
        return False
    assert exchange.model is not None
    exchange.fallen_from = (*exchange.fallen_from, exchange.model)
    exchange.model = found.model
    exchange.targets = None
    order_targets(exchange)
    return True


def order_targets(exchange: "Exchange") -> None:
    """By the shares of the exchange's model, if it has any and nothing else has chosen among its targets."""
    routing = exchange.model.routing if exchange.model is not None else None
    if routing is not None and routing.split is not None and exchange.targets is None:
        exchange.targets = routing.split.order(exchange)


def next_fallback(exchange: "Exchange", failure: FailureClass) -> Fallback | None:
    """What `fall_back` would turn to."""
    model, caller = exchange.model, exchange.caller
    if model is None or caller is None or exchange.continues:
        return None  # what it continues is stored at the model that made it, and nowhere else
    tried = (*exchange.fallen_from, model)
    for parent, fallback in _chain(tried[0]):
        if (
            failure in fallback.failures
            and parent in tried
            and fallback.model not in tried
            and (fallback.grants or may_use(caller, fallback.model.name))
            and fallback.model.candidates(exchange.dialect)
        ):
            return fallback
    return None


def models_after(model: "Model") -> list["Model"]:
    """The model and all that may answer in its place."""
    return [model, *(fallback.model for _, fallback in _chain(model))]


def _chain(model: "Model") -> Iterator[tuple["Model", Fallback]]:
    """Depth first: what follows a model before what follows those before it. Has no cycles: the configuration is checked."""
    for fallback in model.routing.fallbacks if model.routing is not None else ():
        yield model, fallback
        yield from _chain(fallback.model)
