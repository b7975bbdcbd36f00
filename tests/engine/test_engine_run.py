"""`headgate engine run`, as `make run-vllm` calls it: one model, no configuration file."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import anthropic
import openai
import pytest

from tests.engine.pools import MODELS, READY_S
from tests.support.gateway_process import ROOT

pytestmark = pytest.mark.engine
LONG = "A headgate lets water into the channel and opens the spillway when there is too much. " * 20


class Running(NamedTuple):
    url: str
    management: str
    key: str
    operator_key: str
    directory: Path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    directory = tmp_path_factory.mktemp("run")
    printed, log = directory / "printed", directory / "log"
    command = [sys.executable, "-m", "gateway", "engine", "run", str(MODELS / "tiny")]
    command += ["--port", "0", "--management-port", "0", "--directory", str(directory / "data")]
    command += ["--cache-mib", "64"]  # there are other tests
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": ""}
    with printed.open("wb") as out, log.open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=ROOT)
    try:
        found = _told(process, printed, log)
        _await_engine(found, process, log)
        yield found
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def _told(process: subprocess.Popen[bytes], printed: Path, log: Path) -> Running:
    """What it prints when it is ready, the keys of a first start among it."""
    patterns = (
        r"data plane +(http\S+)/v1",
        r"management +(\S+)",
        r"caller key +(\S+)",
        r"operator key +(\S+)",
    )
    deadline = time.monotonic() + 120
    while True:
        found = [re.search(pattern, printed.read_text()) for pattern in patterns]
        if all(found):
            return Running(*(match[1] for match in found if match), log.parent / "data")
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, printed.read_text()
        time.sleep(0.1)


def _await_engine(running: Running, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while engines(running)[0]["ready"] != 1:
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.5)


def engines(running: Running) -> list[dict]:
    headers = {"authorization": f"Bearer {running.operator_key}"}
    request = urllib.request.Request(f"{running.management}/api/engines", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())["pools"]


def test_a_models_folder_is_served_to_the_openai_sdk(running):
    with openai.OpenAI(
        base_url=f"{running.url}/v1", api_key=running.key, max_retries=0, timeout=120
    ) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        texts, cached = [], []
        for _ in range(2):
            message = {"role": "user", "content": LONG}
            answer = client.chat.completions.create(
                model="tiny", messages=[message], max_tokens=8, temperature=0, extra_body={"priority": -7}
            )
            texts.append(answer.choices[0].message.content)
            cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert texts[0] == texts[1]
        assert cached[0] == 0
        assert cached[1] > 0
        stream = client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=8,
            temperature=0,
            stream=True,
        )
        assert sum(bool(chunk.choices) for chunk in stream) > 1


def test_the_anthropic_sdk_is_answered_too_though_its_priority_is_in_a_header(running):
    with anthropic.Anthropic(base_url=running.url, api_key=running.key, max_retries=0, timeout=120) as client:
        answer = client.messages.create(
            model="tiny",
            max_tokens=4,
            messages=[{"role": "user", "content": LONG}],
            extra_body={"temperature": 0},
        )
    assert answer.usage.output_tokens == 4


def test_the_configuration_it_wrote_can_be_planned_and_holds_no_key(running):
    path = running.directory / "run-vllm.yaml"
    command = [sys.executable, "-m", "gateway", "engine", "plan", "--config", str(path), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (planned,) = json.loads(done.stdout)
    assert planned["models"] == ["tiny"]
    assert running.key not in path.read_text()


def test_only_the_gateway_has_the_engines_key(running):
    (pool,) = engines(running)
    port = pool["replicas"][0]["port"]
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30)
    refused.value.close()
    assert refused.value.code == 401
