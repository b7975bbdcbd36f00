"""The compiled build (`make test-compiled`): that it is what these tests speak to, and that it says so."""

import subprocess
from pathlib import Path

import pytest

from tests.support.gateway_process import INSTALLED_PYTHON

pytestmark = pytest.mark.skipif(not INSTALLED_PYTHON, reason="HEADGATE_TEST_PYTHON names no compiled build")


def test_every_worker_runs_the_compiled_code(gateway) -> None:
    workers = gateway.manage("/api/status")["workers"]
    assert workers
    for worker in workers:
        assert "__mypyc." in Path(f"/proc/{worker['pid']}/maps").read_text()


def test_the_command_says_that_it_is_compiled() -> None:
    said = subprocess.run(
        [INSTALLED_PYTHON, "-P", "-m", "gateway", "version"], check=True, capture_output=True, text=True
    )
    assert said.stdout.endswith(" (compiled)\n")
