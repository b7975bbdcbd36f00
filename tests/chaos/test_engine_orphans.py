"""kill -9 of the gateway: its engines serve its successor, or end; none is left that nobody accounts for."""

from collections.abc import Iterator

import pytest

from tests.support.engine_pool import EnginePool, any_alive, everything_of, fake_spec
from tests.support.load import MODEL

pytestmark = pytest.mark.chaos

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


@pytest.fixture
def gateway(tmp_path) -> Iterator[EnginePool]:
    gateway = EnginePool(tmp_path, fake_spec(), workers=1)
    try:
        yield gateway
    finally:
        gateway.kill()


def test_a_killed_gateways_engines_are_taken_over_or_ended(gateway):
    gateway.start()
    gateway.wait_ready()
    first = everything_of(gateway)
    gateway.kill()
    assert len(any_alive(first)) == len(first), "they wait for the next gateway"

    gateway.start()
    gateway.wait_ready()
    assert everything_of(gateway) == first, "what runs by the same plan goes on"
    assert gateway.log().count("an engine of an earlier run is taken over") == 2
    assert [replica["restarts"] for replica in gateway.engines().values()] == [0, 0]
    assert gateway.post("/v1/chat/completions", CHAT)[0] == 200

    gateway.kill()
    gateway.config["pools"]["gpu"]["vllm"]["env"]["ANOTHER"] = "plan"
    gateway.config["engines"] = {"orphan_grace_s": 2}
    gateway.start()
    gateway.wait_ready()
    second = everything_of(gateway)
    assert not any_alive(first), "what runs by another plan is ended"
    assert not second & first

    gateway.kill()
    gateway.wait(lambda: not any_alive(second))
