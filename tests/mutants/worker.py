"""A worker of a broken build; started by `tests.mutants.gateway`."""

import sys

from gateway.app import App
from gateway.worker import main
from tests.mutants.gateway import apply_mutant

if __name__ == "__main__":
    apply_mutant()
    sys.exit(main(sys.argv, App))
