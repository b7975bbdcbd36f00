"""For all tests: names that are the same in every process, the same examples in every run, and the list of what failed."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# What a random search finds should fail here and now, not on somebody else's change: HEADGATE_TEST_SEARCH=1 searches.
settings.register_profile("repeatable", derandomize=True, database=None)
if not os.environ.get("HEADGATE_TEST_SEARCH"):
    settings.load_profile("repeatable")


def pytest_make_parametrize_id(config, val, argname):
    """Compressed bytes hold the time they were made at."""
    del config
    return argname if isinstance(val, bytes) and not (val.isascii() and val.decode().isprintable()) else None


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
