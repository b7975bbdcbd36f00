"""Which models a caller may use.

An allow-list holds public model names or prefixes ending in `*`. A name outside it is refused in the same
words whether or not such a model exists, so that nobody learns what others have.
"""

from collections.abc import Collection

from policies.exchange import Caller, Exchange
from policies.policy import Policy
from policies.verdict import Denial


def may_use(caller: Caller, model_name: str) -> bool:
    """True if the caller's allow-list names the model; no list means every model."""
    return is_listed(model_name, caller.models)


def is_listed(name: str, names: Collection[str] | None) -> bool:
    """True if the list has the name, or its beginning and a `*`; None has every name."""
    if names is None or name in names:
        return True
    return any(pattern.endswith("*") and name.startswith(pattern[:-1]) for pattern in names)


class Access(Policy):
    """Refuses models outside the key's allow-list, and names nobody serves."""

    def admit(self, exchange: Exchange, now: float) -> Denial | None:
        del now
        caller = exchange.caller
        if caller is None or (caller.models is not None and not may_use(caller, exchange.model_name)):
            return Denial(
                403,
                "model_not_allowed",
                f"this key may not use the model `{exchange.model_name}`; GET /v1/models lists what it may use",
                param="model",
            )
        if exchange.model is None:
            return Denial(
                404,
                "model_not_found",
                f"the model `{exchange.model_name}` does not exist here; GET /v1/models lists what does",
                param="model",
            )
        return None


_: type[Policy] = Access
