from policies.policy import Hooks, Policy
from policies.registry import policies


class Admits(Policy):
    def admit(self, exchange, now):
        return None


class Settles(Policy):
    def settle(self, exchange, now):
        return None


def test_a_hook_nobody_overrides_is_not_in_the_tuple():
    hooks = Hooks([Admits(), Settles()])
    assert len(hooks.admit) == 1
    assert len(hooks.settle) == 1


def test_hooks_run_in_the_order_of_the_registry():
    names = [type(policy).__name__ for policy in policies(blocks_unpriced=True)]
    assert names == ["Access", "CostGuard"]
    assert "CostGuard" not in [type(p).__name__ for p in policies(blocks_unpriced=False)]
