"""Past its budget a caller gets the model that is named for it, and nothing of the budget stays reserved."""

from collections.abc import Iterator

import pytest

from tests.e2e.conftest import PRICE, UPSTREAM_KEY
from tests.support.gateway_process import Gateway
from tests.support.upstream_thread import BlockingUpstream, UpstreamThread

pytestmark = pytest.mark.e2e

POOR_KEY = "sk-poor-0c1b2a3948576675"
FREE = {"input": 0, "output": 0}


@pytest.fixture(scope="module")
def main() -> Iterator[BlockingUpstream]:
    with UpstreamThread() as thread:
        yield thread.start()


@pytest.fixture(scope="module")
def gateway(main: BlockingUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    turn = {"model": "local", "failures": ["budget"], "grants": True}
    config = {
        "keys": [{"name": "poor", "key": POOR_KEY, "models": ["dear", "plain"]}],
        "providers": {
            "acme": {"type": "openai", "api_key": UPSTREAM_KEY, "base_url": f"{main.url}/v1"},
        },
        "models": {
            "dear": {
                "targets": [{"provider": "acme", "model": "dear"}],
                "price": PRICE,
                "fallbacks": [turn],
            },
            "plain": {"targets": [{"provider": "acme", "model": "plain"}], "price": PRICE},
            "local": {"targets": [{"provider": "acme", "model": "local"}], "price": FREE},
        },
        "limits": {"rules": [{"scope": "key:poor", "usd": "0.000001", "per": "month"}]},
    }
    with Gateway(tmp_path_factory.mktemp("poor"), **config) as running:
        yield running
        log = running.log()
    assert "Traceback" not in log, log[-8000:]


def ask(gateway: Gateway, model: str):
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 50}
    return gateway.post("/v1/chat/completions", body, {"authorization": f"Bearer {POOR_KEY}"})


def test_a_request_beyond_the_budget_goes_to_the_fallback_that_is_free(gateway, main):
    status, headers, _ = ask(gateway, "dear")
    assert status == 200
    assert {name.lower(): value for name, value in headers.items()}["x-headgate-cost-usd"] == "0.000000000"
    assert [record.model for record in main.journal if record.method == "POST"][-1] == "local"


def test_without_one_it_is_refused(gateway):
    status, _, body = ask(gateway, "plain")
    assert status == 429
    assert b"budget_exceeded" in (body if isinstance(body, bytes) else str(body).encode())
