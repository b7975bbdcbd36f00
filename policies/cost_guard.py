"""What happens to a model whose price is unknown.

Unknown is never $0: the operator chooses to let it through (the row's cost stays unknown and is counted) or to
refuse it.
"""

from policies.exchange import Exchange
from policies.policy import Policy
from policies.routing import Model
from policies.verdict import Denial


def is_unpriced(model: Model) -> bool:
    """No target of it has a price."""
    return all(target.price.kind == "unknown" for target in model.targets)


class CostGuard(Policy):
    """Refuses unpriced models; in the list of policies only when the configuration says `block`."""

    def admit(self, exchange: Exchange, now: float) -> Denial | None:
        del now
        model = exchange.model
        if model is None or not is_unpriced(model):
            return None
        return Denial(
            403,
            "price_unknown",
            f"the model `{model.name}` has no price here and the gateway refuses unpriced models; "
            "its operator can give it one under `prices.overrides` or `models`",
            param="model",
        )


_: type[Policy] = CostGuard
