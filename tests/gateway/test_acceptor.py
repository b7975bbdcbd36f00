import asyncio
import errno
import os
import socket
from collections.abc import Iterator

import pytest

from gateway.acceptor import Acceptor, Loads


class Connections:
    """One worker's connections, counted."""

    def __init__(self) -> None:
        self.open: set[asyncio.BaseTransport] = set()

    def __call__(self) -> asyncio.Protocol:
        owner = self.open

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                self.transport = transport
                owner.add(transport)

            def connection_lost(self, exc: Exception | None) -> None:
                owner.discard(self.transport)

        return Connection()

    def __len__(self) -> int:
        return len(self.open)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.setblocking(False)
        yield listener


@pytest.fixture
def loads() -> Iterator[Loads]:
    loads = Loads.create(4)
    yield loads
    os.close(loads.descriptor)


async def opened(listener: socket.socket, number: int) -> list[asyncio.StreamWriter]:
    return [(await asyncio.open_connection(*listener.getsockname()))[1] for _ in range(number)]


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


async def closed(writers: list[asyncio.StreamWriter], *connections: Connections) -> None:
    for writer in writers:
        writer.close()
        await writer.wait_closed()
    await until(lambda: not any(map(len, connections)))


def test_the_worker_with_the_fewest_connections_is_the_least_and_ties_are_too(loads):
    loads.set(0, 5)
    loads.set(1, 3)
    loads.set(2, 3)
    assert [loads.is_least(place) for place in (0, 1, 2)] == [False, True, True]


def test_workers_that_take_no_connections_do_not_count(loads):
    loads.set(0, 5)
    loads.set(1, 0)
    assert not loads.is_least(0)
    loads.set(1, None)
    assert loads.is_least(0)


def test_places_are_not_given_twice(loads):
    assert loads.take_place({0, 2}) == 1


def test_the_numbers_are_shared_between_processes(loads):
    other = Loads(loads.descriptor)
    loads.set(0, 7)
    loads.set(1, 6)
    assert not other.is_least(0)
    assert other.is_least(1)


async def test_connections_are_shared_out_evenly_and_what_closes_is_made_up_for(listener, loads):
    one, two = Connections(), Connections()
    first = Acceptor(listener.dup(), one, one.__len__, loads, 0)
    writers = await opened(listener, 6)
    await until(lambda: len(one) == 6)
    second = Acceptor(listener.dup(), two, two.__len__, loads, 1)
    writers += await opened(listener, 10)
    await until(lambda: len(one) + len(two) == 16)
    assert (len(one), len(two)) == (8, 8)
    first.close()
    second.close()
    await closed(writers, one, two)


async def test_a_worker_that_does_not_turn_up_does_not_hold_up_the_others(listener, loads):
    loads.set(1, 0)  # it says that it has none, and never accepts: hung, or dead a moment ago
    connections = Connections()
    acceptor = Acceptor(listener.dup(), connections, connections.__len__, loads, 0)
    writers = await opened(listener, 20)
    await until(lambda: len(connections) == 20)
    acceptor.close()
    await closed(writers, connections)


async def test_after_close_nothing_is_taken_and_the_others_know(listener, loads):
    one, two = Connections(), Connections()
    first = Acceptor(listener.dup(), one, one.__len__, loads, 0)
    second = Acceptor(listener.dup(), two, two.__len__, loads, 1)
    first.close()
    first.close()
    writers = await opened(listener, 5)
    await until(lambda: len(two) == 5)
    assert len(one) == 0
    second.close()
    await closed(writers, two)


class Exhausted(socket.socket):
    """A listener in a process that has no descriptor left, once."""

    refusals = 1

    def accept(self) -> tuple[socket.socket, object]:
        if self.refusals:
            self.refusals -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


async def test_without_descriptors_it_waits_and_then_goes_on(listener, loads, monkeypatch, caplog):
    monkeypatch.setattr("gateway.acceptor._PAUSE_S", 0.02)
    connections = Connections()
    exhausted = Exhausted(fileno=os.dup(listener.fileno()))
    exhausted.setblocking(False)
    acceptor = Acceptor(exhausted, connections, connections.__len__, loads, 0)
    writers = await opened(listener, 3)
    await until(lambda: len(connections) == 3)
    assert [record.reason for record in caplog.records] == ["Too many open files"]
    acceptor.close()
    await closed(writers, connections)
