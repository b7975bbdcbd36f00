"""Rows of several nodes: each in every node's ledger once, wherever a node or the stream between them dies."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.ledger_flow import LedgerFlow
from gateway.stores import ledger_table
from gateway.stores.ledger_sink import OtherShipperError
from gateway.stores.ledger_stream import RedisLedgerStream
from gateway.stores.limit_store import StoreAwayError
from gateway.stores.redis_connection import RedisConnection
from gateway.stores.sqlite import DATABASE_NAME, database
from tests.support.ledger_rows import a_row, rows_in
from tests.support.redis_server import RedisServer


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), appendonly="yes", appendfsync="no") as server:
        yield server


class Killed(BaseException):
    """The node died here."""


class Mortal:
    """A sink on whose n-th call the node dies, before it or after it was carried out. Over a real one."""

    def __init__(self, inner: RedisLedgerStream, calls: Iterator[int], dies_at: int, *, after: bool) -> None:
        self._inner, self._calls, self._dies_at, self._after = inner, calls, dies_at, after

    def __getattr__(self, name: str):
        async def call(*arguments):
            if name == "close":
                return None
            is_last = next(self._calls) == self._dies_at
            if is_last and not self._after:
                raise Killed
            result = await getattr(self._inner, name)(*arguments)
            if is_last:
                raise Killed
            return result

        return call


class Node:
    """A node's database and its connection to the stream."""

    def __init__(self, directory: Path, name: str, url: str, **options) -> None:
        self.directory, self.name, self._url, self._options = directory / name, name, url, options
        self._ids = itertools.count()
        self.sink = self.flow = None
        with database(self.path):
            pass

    @property
    def path(self) -> Path:
        return self.directory / DATABASE_NAME

    async def start(self, mortal: tuple[Iterator[int], int, bool] | None = None) -> None:
        """Also again, after a kill: whoever shipped before is believed dead."""
        await self.close()
        self.sink = RedisLedgerStream(
            RedisConnection(self._url, "hg", timeout_s=5.0), self.name, **self._options
        )
        sink = self.sink if mortal is None else Mortal(self.sink, mortal[0], mortal[1], after=mortal[2])
        self.flow = LedgerFlow(self.directory, self.name, sink)

    async def close(self) -> None:
        if self.flow is not None:
            await self.flow.close()
            await self.sink.close()
        self.flow = None

    def spend(self, rows: int) -> None:
        made = [a_row(f"{self.name}-{next(self._ids)}", cost_nanousd=7, tags='["a"]') for _ in range(rows)]
        with database(self.path) as connection:
            ledger_table.insert(connection, made)

    async def step(self) -> bool:
        return (await self.flow.send()) | (await self.flow.collect())

    def costs(self) -> dict[str, int]:
        return {request_id: row.cost_nanousd for request_id, row in rows_in(self.directory).items()}


async def settle(*nodes: Node, steps: int = 12) -> None:
    for _ in range(steps):
        for node in nodes:
            while await node.step():
                pass


@pytest.fixture
async def nodes(server, tmp_path) -> AsyncIterator[tuple[Node, Node]]:
    server.command("FLUSHALL")
    pair = Node(tmp_path, "a", server.url), Node(tmp_path, "b", server.url)
    for node in pair:
        await node.start()
    yield pair
    for node in pair:
        await node.close()


def everything(a: int, b: int) -> dict[str, int]:
    return {f"{name}-{number}": 7 for name, count in (("a", a), ("b", b)) for number in range(count)}


async def test_every_node_has_the_rows_of_all(nodes) -> None:
    a, b = nodes
    a.spend(450)
    await settle(a, b)
    b.spend(30)
    a.spend(1)
    await settle(a, b)
    assert a.costs() == b.costs() == everything(451, 30)
    assert {row.node for row in rows_in(a.directory).values()} == {"", "b"}
    assert rows_in(b.directory)["a-3"].tags == '["a"]'
    assert (a.flow.health().sent, a.flow.health().collected) == (451, 30)


async def test_a_node_that_comes_later_gets_what_was_before(nodes, server, tmp_path) -> None:
    a, b = nodes
    a.spend(5)
    await settle(a, b)
    server.command("DEL", "{hg}:ledger:rows")  # long ago
    late = Node(tmp_path, "late", server.url)
    await late.start()
    await settle(a, b, late)
    assert late.costs() == everything(5, 0)
    await late.close()


async def test_a_stream_that_was_too_short_is_read_again(server, tmp_path) -> None:
    server.command("FLUSHALL")
    a, b = Node(tmp_path, "a", server.url, entries=3), Node(tmp_path, "b", server.url)
    await a.start()
    await b.start()
    for _ in range(400):  # small entries are trimmed by the hundred
        a.spend(1)
        await a.step()
    await settle(a, b)
    assert b.costs() == everything(400, 0)
    for node in (a, b):
        await node.close()


async def test_what_redis_lost_is_sent_again(nodes, server) -> None:
    a, b = nodes
    a.spend(10)
    await settle(a, b)
    a.spend(10)
    await a.step()  # on the stream, and not read yet
    server.command("FLUSHALL")
    b.spend(3)
    await settle(a, b)
    assert a.costs() == b.costs() == everything(20, 3)
    a.spend(1)
    await settle(a, b)
    assert b.costs() == everything(21, 3)


async def test_a_failover_to_an_older_state_loses_no_row(nodes, server) -> None:
    a, b = nodes
    a.spend(5)
    await settle(a, b)
    kept = {key: server.command("DUMP", key) for key in server.command("KEYS", "*")}
    a.spend(5)
    await settle(a, b)
    a.spend(5)
    await a.step()
    server.command("FLUSHALL")
    for key, value in kept.items():
        server.command("RESTORE", key, 0, value)
    b.spend(2)
    await settle(a, b)
    assert a.costs() == b.costs() == everything(15, 2)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("dies_at", range(9))
async def test_a_node_may_die_at_any_call(nodes, dies_at, after) -> None:
    a, b = nodes
    b.spend(205)
    await settle(b)
    calls = itertools.count()
    a.spend(205)
    await a.start((calls, dies_at, after))
    with pytest.raises(Killed):
        for _ in range(10):
            await a.step()
    a.spend(3)
    await a.start()
    await settle(a, b)
    assert a.costs() == b.costs() == everything(208, 205)


async def test_a_frozen_stream_holds_up_nothing_and_loses_nothing(nodes, server) -> None:
    a, b = nodes
    a.spend(5)
    quick = RedisLedgerStream(RedisConnection(server.url, "hg", timeout_s=0.1), "a")
    flow = LedgerFlow(a.directory, "a", quick)
    server.freeze()
    try:
        for _ in range(3):
            with pytest.raises(StoreAwayError):
                await flow.send()
    finally:
        server.thaw()
    await flow.close()
    await settle(a, b)
    assert b.costs() == everything(5, 0)


async def test_a_database_from_a_backup_sends_everything_again(nodes, server, tmp_path) -> None:
    a, b = nodes
    a.spend(20)
    await settle(a, b)
    await a.close()
    restored = Node(tmp_path / "restored", "a", server.url)
    restored.spend(5)  # of which the others have heard
    await restored.start()
    await settle(restored, b)
    restored.spend(1)
    await settle(restored, b)
    assert b.costs() == everything(20, 0)
    assert await restored.sink.positions() == {"a": 6, "b": 0}
    await restored.close()


async def test_two_nodes_of_one_name_do_not_mix(nodes, server, tmp_path) -> None:
    a, _ = nodes
    a.spend(1)
    await a.step()
    twin = Node(tmp_path / "twin", "a", server.url)
    await twin.start()
    with pytest.raises(OtherShipperError):
        await twin.flow.send()
    await twin.close()
    await a.step()
