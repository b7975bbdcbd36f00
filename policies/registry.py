"""The policies, in order of execution. A new policy is one file and one line here."""

from policies.access import Access
from policies.cost_guard import CostGuard
from policies.limits.policy import Limits
from policies.policy import Policy
from policies.rules.rule import Rules


def policies(
    *, blocks_unpriced: bool, rules: Rules | None = None, limits: Limits | None = None
) -> list[Policy]:
    """Rules first: what follows judges the model they choose. Then access: nobody learns from a later refusal what
    they may not use. Limits last of those that may refuse.
    """
    chosen: list[Policy] = [rules] if rules is not None else []
    chosen.append(Access())
    if blocks_unpriced:
        chosen.append(CostGuard())
    if limits is not None:
        chosen.append(limits)
    return chosen
