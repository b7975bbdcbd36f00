"""The state machine of limits over the store in memory, which is the meaning of all stores."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test

from tests.support import limit_machine
from tests.support.limit_memory import MemoryStore


@pytest.mark.parametrize("over_admission", [0.0, 0.5])
def test_limits_hold_whatever_happens_in_whatever_order(over_admission) -> None:
    machine = limit_machine.machine(MemoryStore, over_admission=over_admission)
    run_state_machine_as_test(machine, settings=settings(**limit_machine.settings()))
