"""One instant simulator for a module's tests, and clients of it."""

import aiohttp
import anthropic
import openai
import pytest

from tests.support.simulator_process import SimulatorProcess


@pytest.fixture(scope="module")
def simulator():
    """Instant, with faults allowed."""
    with SimulatorProcess(allow_faults=True, max_model_len=8192) as process:
        yield process


@pytest.fixture
async def client(simulator):
    async with openai.AsyncOpenAI(
        base_url=f"{simulator.url}/v1", api_key="none", max_retries=0, timeout=60
    ) as sdk:
        yield sdk


@pytest.fixture
async def claude(simulator):
    async with anthropic.AsyncAnthropic(
        base_url=simulator.url, api_key="none", max_retries=0, timeout=60
    ) as sdk:
        yield sdk


@pytest.fixture
async def http(simulator):
    async with aiohttp.ClientSession(simulator.url) as session:
        yield session
