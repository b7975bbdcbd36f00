"""A gateway with a queue in front of a scripted provider, for the doors: files and batches, responses, Workers AI."""

import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import openai
import pytest

from tests.e2e.conftest import UNWATCHED, UPSTREAM_KEY
from tests.support.gateway_process import KEY, Gateway
from tests.support.upstream_thread import BlockingUpstream, UpstreamThread

OTHER_KEY = "sk-other-0c9d8e7f6a5b4c3d"
PRICE = {"input": 2.5, "cached_input": 0.25, "output": 10.0}
LLAMA = "@cf/meta/llama-3.1-8b-instruct"
BGE = "@cf/baai/bge-m3"
WITHIN_S = 60.0


class Doors(NamedTuple):
    gateway: Gateway
    upstream: BlockingUpstream
    thread: UpstreamThread
    client: openai.OpenAI
    other: openai.OpenAI  # of another tenant

    def until(self, ask, is_there, within_s: float = WITHIN_S) -> Any:
        """What `ask` answers, once it is what is waited for."""
        deadline = time.monotonic() + within_s
        while not is_there(found := ask()):
            assert time.monotonic() < deadline, f"still {found!r}"
            time.sleep(0.05)
        return found

    def upload(self, lines: list[dict[str, Any]] | bytes, client: openai.OpenAI | None = None):
        data = (
            lines
            if isinstance(lines, bytes)
            else b"".join(json.dumps(each).encode() + b"\n" for each in lines)
        )
        return (client or self.client).files.create(file=("requests.jsonl", data), purpose="batch")

    def start(self, lines: list[dict[str, Any]] | bytes, **more: Any):
        """A batch of these lines."""
        asked = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | more
        return self.client.batches.create(input_file_id=self.upload(lines).id, **asked)

    def ended(self, batch_id: str):
        final = {"completed", "failed", "expired", "cancelled"}
        return self.until(lambda: self.client.batches.retrieve(batch_id), lambda found: found.status in final)

    def content(self, file_id: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.client.files.content(file_id).text.splitlines()]

    def native(self, path: str, body: Any, **headers: str) -> tuple[int, dict[str, Any]]:
        status, _, answer = self.gateway.post(f"/client/v4/accounts/abc123/ai/{path}", body, headers)
        return status, json.loads(answer)


@pytest.fixture(scope="session")
def doors(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Doors]:
    with UpstreamThread() as thread:
        upstream = thread.start()
        acme = {
            "type": "openai",
            "api_key": UPSTREAM_KEY,
            "base_url": f"{upstream.url}/v1",
            "health": UNWATCHED,
        }
        target = {"provider": "acme"}
        config: dict[str, Any] = {
            "queue": {"enabled": True, "files": {"file_bytes": 100_000}, "batches": {"requests": 50}},
            "keys": [{"name": "other", "key": OTHER_KEY, "team": "others"}],
            "providers": {"acme": acme},
            "models": {
                "half": {"targets": [target], "price": PRICE, "async_price_factor": 0.5},
                LLAMA: {"targets": [{**target, "model": "plain"}]},
                BGE: {"targets": [{**target, "model": "bge-m3"}]},
            },
            "prices": {"overrides": {"acme/*": PRICE}},
        }
        with Gateway(tmp_path_factory.mktemp("doors"), workers=2, **config) as gateway:
            options: dict[str, Any] = {"base_url": gateway.base_url, "max_retries": 0, "timeout": 60}
            client = openai.OpenAI(api_key=KEY, **options)
            other = openai.OpenAI(api_key=OTHER_KEY, **options)
            with client, other:
                yield Doors(gateway, upstream, thread, client, other)
            log = gateway.log()
    assert "Traceback" not in log, log[-8000:]


@pytest.fixture(autouse=True)
def _nothing_scripted(doors: Doors) -> None:
    doors.upstream.clear()
