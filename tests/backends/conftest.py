"""Event loops and certificates for the tests of what touches sockets."""

import asyncio

import pytest
import uvloop

from tests.support.certificates import Authority

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def pytest_asyncio_loop_factories(config, item):
    """A module that says `LOOPS = ("uvloop", "asyncio")` has its async tests run on both."""
    return {name: LOOPS[name] for name in getattr(item.module, "LOOPS", ("asyncio",))}


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="session")
def localhost_tls(authority):
    """A server context whose certificate is for localhost alone."""
    return authority.server_context("DNS:localhost")
