"""Probes against the simulator, which answers as vLLM does."""

import dataclasses

import pytest

from backends import probes
from backends.pool import Endpoint
from backends.registry import KNOWN
from backends.transport import ConnectionPool, Deadlines, Origin
from tests.support.gateway_process import free_port
from tests.support.simulator_process import SimulatorProcess


@pytest.fixture(scope="module")
def engine():
    with SimulatorProcess(allow_faults=True) as running:
        yield running


@pytest.fixture
async def endpoint(engine):
    made = an_endpoint(f"{engine.url}/v1")
    yield made
    await made.connections.close()
    engine.fault(None)


def an_endpoint(url: str, **facts) -> Endpoint:
    origin, base_path = Origin.parse(url)
    provider = dataclasses.replace(KNOWN["simulator"], **facts)
    return Endpoint("gpu/0", provider, ConnectionPool(origin), base_path, None, Deadlines())


@pytest.mark.parametrize("dialect", ["completions", "chat", "messages", "embeddings"])
async def test_one_token_is_asked_for_in_whatever_dialect_there_is(engine, dialect):
    paths = {dialect: KNOWN["simulator"].paths[dialect]}
    endpoint = an_endpoint(f"{engine.url}/v1", paths=paths)
    probe = await probes.generate(endpoint, "demo", 5.0)
    assert probe.is_ok
    assert probe.status == 200
    await endpoint.connections.close()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status=500", "500"),
        ("hang", "first_byte_timeout"),
        ("reset", "reset"),
        ("status=503", ""),
        ("status=429", ""),
        ("status=400", ""),
    ],
)
async def test_an_engine_that_cannot_generate_fails_the_probe_and_one_that_will_not_passes(
    engine, endpoint, fault, reason
):
    engine.fault(fault)
    assert (await probes.generate(endpoint, "demo", 0.3)).reason == reason
    assert (await probes.look(endpoint, "/health", 5.0)).is_ok


async def test_the_load_is_read_from_either_page(endpoint):
    for path in ("/metrics", "/load"):
        probe, loads = await probes.load(endpoint, path, 5.0)
        assert probe.is_ok
        assert loads.now[0][:2] == (0, 0)
    assert (await probes.load(endpoint, "/version", 5.0))[1] == ({}, {})


async def test_nobody_there_is_an_outcome_like_any_other():
    endpoint = an_endpoint(f"http://127.0.0.1:{free_port()}/v1")
    assert (await probes.generate(endpoint, "demo", 5.0)).reason == "connect"
    assert (await probes.look(endpoint, "/health", 5.0)).reason == "connect"
