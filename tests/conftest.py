"""For all tests: the same names and examples in every process and run, who begins with what, and the list of what failed."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# What a random search finds should fail here and now, not on somebody else's change: HEADGATE_TEST_SEARCH=1 searches. How
# long an example takes is the machine's business.
patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, database=None, **patient)
settings.register_profile("search", **patient)
settings.load_profile("search" if os.environ.get("HEADGATE_TEST_SEARCH") else "repeatable")


def pytest_make_parametrize_id(config, val, argname):
    """Compressed bytes hold the time they were made at."""
    del config
    return argname if isinstance(val, bytes) and not (val.isascii() and val.decode().isprintable()) else None


# Files whose tests wait long for what takes its time. Side by side they end before the others do, which fill the gaps.
LONGEST = (
    "tests/e2e/test_engines.py",
    "tests/chaos/test_nodes.py",
    "tests/chaos/test_sick_replicas.py",
    "tests/chaos/test_storage_trouble.py",
    "tests/chaos/test_load_counters.py",
    "tests/e2e/test_endpoint_health.py",
)


def pytest_collection_modifyitems(config, items):
    """Each of the processes begins with one of the longest files; what it has left in the end, others take over."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers == 1:
        return
    long = {name: [item for item in items if item.nodeid.startswith(name)] for name in LONGEST}
    rest = [item for item in items if not item.nodeid.startswith(LONGEST)]
    share = -(-len(rest) // workers)
    ordered = []
    for number in range(workers):
        for name in LONGEST[number::workers]:
            ordered += long[name]
        ordered += rest[number * share : (number + 1) * share]
    items[:] = ordered


class Failures:
    """Writes the names of the tests that failed, a line each, for `tests/run`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: dict[str, None] = {}

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self._names[report.nodeid] = None

    def pytest_sessionfinish(self):
        self._path.write_text("".join(f"{name}\n" for name in self._names))


def pytest_configure(config):
    path = os.environ.get("HEADGATE_TEST_FAILURES")
    if path and not hasattr(config, "workerinput"):  # once, however many processes there are
        config.pluginmanager.register(Failures(Path(path)), "failures")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter):
    """Names what passed only when it was repeated: each is a fault of the test or of the code, to be mended."""
    flaky = dict.fromkeys(report.nodeid for report in terminalreporter.stats.get("rerun", ()))
    for name in flaky:
        terminalreporter.write_line(f"REPEATED {name}")
