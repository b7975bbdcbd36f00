"""openai-node against files, batches and background responses; see tests/e2e/test_node.py."""

import json
import subprocess

import pytest

from tests.e2e.test_node import COMMAND, DIRECTORY
from tests.support.gateway_process import KEY

pytestmark = pytest.mark.e2e

SCRIPT = "doors.mjs"


def test_the_javascript_sdk_goes_through_every_door(doors):
    assert (DIRECTORY / "node_modules/.installed").exists(), (
        "the JavaScript SDKs are missing: run tests/setup"
    )
    environ = {"GATEWAY_URL": doors.gateway.url, "GATEWAY_KEY": KEY, "UPSTREAM_URL": doors.upstream.url}
    done = subprocess.run(
        [*COMMAND, SCRIPT],
        cwd=DIRECTORY,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    errors = {}
    for told in done.stdout.splitlines():
        if told.startswith('{"name":'):
            found = json.loads(told)
            errors[found["name"]] = found["error"]
    written = (DIRECTORY / SCRIPT).read_text().count('\ntest("')
    assert len(errors) == written, done.stdout[-4000:] + done.stderr[-4000:]
    failed = {name: error for name, error in errors.items() if error is not None}
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())
