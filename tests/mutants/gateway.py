"""A broken build of the whole gateway, for the tests that must catch it: parent and workers start with the mutant.

    HEADGATE_TEST_MUTANT=opens_no_intent python -m tests.mutants.gateway serve --config FILE

The product itself knows nothing of this: only these two modules read the variable.
"""

import functools
import os
import sys

import gateway.server
from gateway.__main__ import main
from tests.mutants.health import MUTANTS as HEALTH_MUTANTS
from tests.mutants.idempotency import MUTANTS as IDEMPOTENCY_MUTANTS
from tests.mutants.ledger import MUTANTS as LEDGER_MUTANTS
from tests.mutants.limits import MUTANTS as LIMITS_MUTANTS
from tests.mutants.nodes import MUTANTS as NODES_MUTANTS
from tests.mutants.placement import MUTANTS as PLACEMENT_MUTANTS
from tests.mutants.prefill import MUTANTS as PREFILL_MUTANTS
from tests.mutants.queue import MUTANTS as QUEUE_MUTANTS
from tests.mutants.recovery import MUTANTS as RECOVERY_MUTANTS

MUTANTS = (
    HEALTH_MUTANTS
    | IDEMPOTENCY_MUTANTS
    | LEDGER_MUTANTS
    | LIMITS_MUTANTS
    | NODES_MUTANTS
    | PLACEMENT_MUTANTS
    | QUEUE_MUTANTS
    | PREFILL_MUTANTS
    | RECOVERY_MUTANTS
)


def apply_mutant() -> None:
    MUTANTS[os.environ["HEADGATE_TEST_MUTANT"]]()


if __name__ == "__main__":
    apply_mutant()
    gateway.server.FleetSettings = functools.partial(
        gateway.server.FleetSettings, command=(sys.executable, "-m", "tests.mutants.worker")
    )
    main()
