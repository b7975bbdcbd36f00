"""The compiled build: `HEADGATE_COMPILE=1 pip wheel .` turns the modules that a request passes into C with mypyc.

Without that variable this file does nothing and the wheel is pure Python: pyproject.toml says what a package is, and a
checkout never runs compiled. The Python sources are in either wheel: tracebacks quote them. Why these modules and no
others: docs/decisions/0031-the-wheel-may-be-compiled.md.
"""

import os
import shutil
import sys
import sysconfig
import tomllib
from pathlib import Path

from setuptools import setup

SWITCH = "HEADGATE_COMPILE"
MYPY = "mypy==2.4.1"  # as in requirements-dev.lock: another version is another compiler

# What every request runs through, in the order of what compiling each of them takes off a request. A module is left out
# where a request spends next to nothing in it, where it is mostly declarations that a library reads at run time
# (pydantic, command lines), or where it waits far more than it computes.
COMPILED = (
    "gateway/pipeline.py",
    "gateway/sending.py",
    "policies/exchange.py",
    "gateway/connection.py",
    "gateway/request.py",
    "gateway/telemetry.py",
    "gateway/intake.py",
    "gateway/relay.py",
    "gateway/settle.py",
    "backends/connection.py",
    "backends/http1.py",
    "backends/reply.py",
    "backends/adapter.py",
    "backends/transport.py",
    "backends/outbox.py",
    "gateway/intents.py",
    "gateway/ledger.py",
    "policies/health/endpoint.py",
    "policies/placement/place.py",
    "policies/cost.py",
    "gateway/http_rules.py",
    "gateway/placing.py",
    "gateway/routes.py",
    "gateway/locality.py",
    "gateway/keys.py",
    "gateway/waiting_room.py",
    "gateway/errors.py",
    "gateway/endpoints/context.py",
    "gateway/endpoints/inference.py",
    "backends/json_object.py",
    "backends/load.py",
    "backends/pool.py",
    "backends/tap.py",
    "backends/sse.py",
    "policies/health/book.py",
    "policies/placement/hold.py",
    "policies/placement/saturation.py",
    "policies/placement/room.py",
    "policies/rate_card.py",
    "policies/retry.py",
    "policies/rules/fallback.py",
    "policies/access.py",
    "policies/routing.py",
    "policies/limits/policy.py",
    "policies/limits/account.py",
    "policies/limits/estimate.py",
    "policies/limits/holding.py",
    "policies/limits/book.py",
)


def is_wanted() -> bool:
    return os.environ.get(SWITCH, "0") not in {"", "0"}


def extensions() -> list[object]:
    """The C extensions of a compiled wheel, built by mypyc; none for a pure one or for an editable install."""
    if not is_wanted() or "bdist_wheel" not in sys.argv:
        return []
    compiler = os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if shutil.which(compiler.split()[0]) is None or not header.exists():
        raise SystemExit(
            f"{SWITCH} is set, and there is no C compiler ({compiler.split()[0]}) or no {header}: on Debian and Ubuntu,"
            f" apt-get install gcc libc6-dev python3-dev. Without {SWITCH} the wheel is pure Python."
        )
    from mypyc.build import mypycify  # only a compiled build has it

    # Types are checked by `make lint`; here they are only read, whatever stubs the build has.
    options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]
    return mypycify([*options, *COMPILED], opt_level="2", debug_level="0", multi_file=True)


def requirements() -> list[str]:
    """What a compiled build must have installed: mypy, and the libraries whose types the modules use."""
    if not is_wanted():
        return []
    project = tomllib.loads((Path(__file__).parent / "pyproject.toml").read_text())["project"]
    return [MYPY, *project["dependencies"]]


setup(ext_modules=extensions(), setup_requires=requirements())
