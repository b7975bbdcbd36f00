"""What a policy is: up to two synchronous hooks, compiled into tuples at start-up.

`admit` may refuse, `settle` trues up; a hook that a policy does not override
is not in the tuple, so it costs nothing. Order is the order of `policies.registry`.
"""

from collections.abc import Callable, Sequence

from policies.exchange import Exchange
from policies.verdict import Denial

Admit = Callable[[Exchange, float], Denial | None]
Settle = Callable[[Exchange, float], None]


class Policy:
    """Two hooks that do nothing. `now` is `time.perf_counter()` seconds."""

    chooses_model = False  # its `admit` may put another model in place of the one asked for

    def admit(self, exchange: Exchange, now: float) -> Denial | None:
        """Before placement; what it takes, `settle` gives back."""

    def settle(self, exchange: Exchange, now: float) -> None:
        """Runs once for every request that reached `admit`, denied or not."""


class Hooks:
    """The hooks of all policies, in order."""

    __slots__ = ("admit", "admit_again", "settle")

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.admit: tuple[Admit, ...] = tuple(p.admit for p in policies if _overrides(p, "admit"))
        # What judges the model: for another one, by which the request was turned to.
        self.admit_again: tuple[Admit, ...] = tuple(
            p.admit for p in policies if _overrides(p, "admit") and not p.chooses_model
        )
        self.settle: tuple[Settle, ...] = tuple(p.settle for p in policies if _overrides(p, "settle"))


def _overrides(policy: Policy, hook: str) -> bool:
    return getattr(type(policy), hook) is not getattr(Policy, hook)
