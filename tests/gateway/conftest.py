"""Event loops for the tests of what touches sockets."""

import asyncio

import uvloop

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


def pytest_asyncio_loop_factories(config, item):
    """A module that says `LOOPS = ("uvloop", "asyncio")` has its async tests run on both."""
    return {name: LOOPS[name] for name in getattr(item.module, "LOOPS", ("asyncio",))}
