"""Both stores of jobs, for the suites that ask both."""

import pytest

from tests.support.queue_stores import STORES, opened


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    with opened(tmp_path_factory.mktemp("queue")) as servers:
        yield servers


@pytest.fixture(params=STORES)
async def queue(request, tmp_path, servers):
    """`queue.store` and `queue.other` are two processes' views of one queue; `queue.clock` is its time."""
    pair = await servers.queue(request.param, tmp_path)
    yield pair
    await pair.close()
