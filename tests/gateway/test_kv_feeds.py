"""KV events over real sockets: from an engine's publisher to a worker's index, through every kind of loss."""

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry, Counter

from backends.engine_load import EngineTotals
from backends.kv_blocks import Chain
from backends.pool import Pool
from gateway import kv_feeds
from gateway.cache_watch import CacheWatch
from gateway.kv_feeds import KvFeeds
from tests.support.builders import a_provider, an_endpoint
from tests.support.gateway_process import free_port
from tests.support.publisher import Publisher
from tests.support.telling_engine import TellingEngine

SIZE = 2


def stored(*tokens, parent=None):
    names = [tokens[n] for n in range(1, len(tokens), SIZE)]
    return ["BlockStored", names, parent, list(tokens), SIZE, None]


def prompt(*tokens):
    return Chain(SIZE).extended(tokens)


class Setting:
    """An engine, its publishers, the parent's feeds, and one worker that hears them."""

    def __init__(self, engine):
        self.engine = engine
        self.registry = CollectorRegistry()
        self.caches = CacheWatch()
        self.feeds = KvFeeds(lambda word, _: self.caches.hear(word), self._counter)
        self.endpoints = []

    def _counter(self, name, text, labels):
        return Counter(name, text, labels, registry=self.registry)

    async def follow(self, ranks=(None,)):
        provider = a_provider(base_url=self.engine.base_url)
        for place, rank in enumerate(ranks):
            endpoint = an_endpoint(f"pool/{place}", provider)
            endpoint.rank = rank
            self.endpoints.append(endpoint)
        self.caches.declare({"pool": Pool("pool", tuple(self.endpoints))})
        await self.feeds.apply(self.endpoints)

    def publishes(self, publisher, rank=0):
        self.engine.sources[str(rank)] = {
            "endpoint": publisher.endpoint,
            "replay_endpoint": publisher.replay,
            "topic": "",
            "publisher": "zmq",
        }

    def matched(self, chain):
        index = self.caches.index("pool")
        return {key.decode(): hit for key, hit in index.match(chain).items()}

    def states(self):
        return [self.feeds.view(endpoint)["kv_events"] for endpoint in self.endpoints]

    def gaps(self, outcome):
        return self.registry.get_sample_value(
            "headgate_kv_event_gaps_total", {"endpoint": "pool/0", "outcome": outcome}
        )


async def until(condition, within_s=60.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


@pytest.fixture
async def setting(monkeypatch):
    monkeypatch.setattr(kv_feeds, "_RETRY_S", 0.05)
    async with TellingEngine() as engine:
        made = Setting(engine)
        yield made
        await made.feeds.stop()
        for endpoint in made.endpoints:
            await endpoint.connections.close()


@pytest.fixture
def publishers():
    made = []

    def publish(*addresses, **options):
        made.append(Publisher(*addresses, **options))
        return made[-1]

    yield publish
    for publisher in made:
        publisher.stop()


@pytest.fixture
def ipc(tmp_path):
    return f"ipc://{tmp_path}/kv", f"ipc://{tmp_path}/replay"


async def test_what_was_published_before_and_what_is_published_now_is_known(setting, publishers, ipc):
    publisher = publishers(*ipc)
    publisher.publish(stored(1, 2, 3, 4))
    setting.publishes(publisher)
    await setting.follow()
    await until(lambda: setting.states() == ["complete"])
    assert setting.matched(prompt(1, 2, 3, 4, 5)) == {"pool/0": 4}
    publisher.publish(stored(5, 6, parent=4))
    await until(lambda: setting.matched(prompt(1, 2, 3, 4, 5, 6, 7)) == {"pool/0": 6})
    publisher.publish(["BlockRemoved", [6]], ["BlockRemoved", [4]])
    await until(lambda: setting.matched(prompt(1, 2, 3, 4, 5)) == {"pool/0": 2})
    publisher.publish(["AllBlocksCleared"])
    await until(lambda: setting.matched(prompt(1, 2, 3, 4, 5)) == {"pool/0": 0})


async def test_ranks_over_tcp_have_caches_of_their_own(setting, publishers):
    for rank in (0, 1):
        publisher = publishers("tcp://127.0.0.1:*", "tcp://127.0.0.1:*")
        publisher.publish(stored(rank, 7))
        publisher.endpoint = publisher.endpoint.replace("127.0.0.1", "*")  # as vLLM tells it
        publisher.replay = publisher.replay.replace("127.0.0.1", "*")
        setting.publishes(publisher, rank)
    await setting.follow(ranks=(0, 1))
    await until(lambda: setting.states() == ["complete", "complete"])
    assert setting.matched(prompt(0, 7, 8)) == {"pool/0": 2, "pool/1": 0}
    assert setting.matched(prompt(1, 7, 8)) == {"pool/0": 0, "pool/1": 2}


async def test_a_lost_message_is_had_again(setting, publishers, ipc):
    publisher = publishers(*ipc)
    setting.publishes(publisher)
    await setting.follow()
    await until(lambda: setting.states() == ["complete"])
    publisher.publish(stored(1, 2))
    publisher.publish(stored(3, 4), is_lost=True)
    publisher.publish(stored(5, 6))
    await until(lambda: setting.matched(prompt(5, 6, 7)) == {"pool/0": 2})
    assert setting.matched(prompt(3, 4, 5)) == setting.matched(prompt(1, 2, 3)) == {"pool/0": 2}
    assert setting.gaps("filled") == 1
    assert setting.states() == ["complete"]


async def test_what_cannot_be_had_again_drops_all_that_was_known(setting, publishers, ipc):
    """And what the publisher still remembers is known from then on, as a part."""
    publisher = publishers(*ipc, keeps=2)
    setting.publishes(publisher)
    await setting.follow()
    await until(lambda: setting.states() == ["complete"])
    publisher.publish(stored(1, 2))
    await until(lambda: setting.matched(prompt(1, 2, 3)) == {"pool/0": 2})
    for n in range(10, 20, 2):
        publisher.publish(stored(n, n + 1), is_lost=True)
    publisher.publish(stored(5, 6))
    await until(lambda: setting.matched(prompt(5, 6, 7)) == {"pool/0": 2})
    assert setting.matched(prompt(1, 2, 3)) == {"pool/0": 0}
    assert setting.gaps("dropped") == 1
    assert setting.states() == ["partial"]


async def test_a_publisher_that_cannot_repeat_is_known_from_now_on(setting, publishers, ipc):
    publisher = publishers(ipc[0])
    publisher.publish(stored(1, 2))
    setting.publishes(publisher)
    await setting.follow()
    await until(lambda: setting.states() == ["partial"])
    deadline = time.monotonic() + 60
    while setting.matched(prompt(3, 4, 5)) != {"pool/0": 2}:  # a subscription takes a moment
        assert time.monotonic() < deadline
        publisher.publish(stored(3, 4))
        await asyncio.sleep(0.05)
    publisher.publish(stored(5, 6), is_lost=True)
    publisher.publish(stored(7, 8))
    publisher.publish(stored(9, 10))
    await until(lambda: setting.matched(prompt(9, 10, 11)) == {"pool/0": 2})
    assert setting.matched(prompt(3, 4, 5)) == {"pool/0": 0}
    assert setting.gaps("dropped") == 1


async def test_an_engine_that_ends_is_forgotten_and_its_successor_is_known_anew(setting, publishers, ipc):
    first = publishers(*ipc)
    setting.publishes(first)
    await setting.follow()
    await until(lambda: setting.states() == ["complete"])
    first.publish(stored(1, 2))
    first.publish(stored(3, 4))
    await until(lambda: setting.matched(prompt(3, 4, 5)) == {"pool/0": 2})
    first.stop()
    await until(lambda: setting.matched(prompt(3, 4, 5)) == {})  # nobody may believe it now
    second = publishers(*ipc)
    second.publish(stored(7, 8))
    second.publish(stored(9, 10))
    second.publish(stored(11, 12))
    await until(lambda: setting.states() == ["complete"])
    await until(lambda: setting.matched(prompt(11, 12, 13)) == {"pool/0": 2})
    assert setting.matched(prompt(3, 4, 5)) == {"pool/0": 0}


async def test_an_engine_that_computes_and_tells_nothing_is_not_believed(
    setting, publishers, ipc, monkeypatch
):
    monkeypatch.setattr(kv_feeds, "_SILENT_S", 0.2)
    monkeypatch.setattr(kv_feeds, "_SETTLE_S", 0.1)
    publisher = publishers(*ipc)
    setting.publishes(publisher)
    await setting.follow()
    (endpoint,) = setting.endpoints
    await until(lambda: setting.states() == ["complete"])
    # Requests shorter than a block are told of by nobody.
    for n in range(1, 10):
        setting.feeds.worked(endpoint, EngineTotals(prompt_tokens=n, finished=n), 0)
        await asyncio.sleep(0.05)
    assert setting.states() == ["complete"]
    publisher.publish(stored(1, 2))  # so the size of a block is known
    await until(lambda: setting.matched(prompt(1, 2, 3)) == {"pool/0": 2})
    deadline, tokens = time.monotonic() + 60, 1000
    while setting.states() != ["silent"]:
        assert time.monotonic() < deadline
        tokens += 100
        setting.feeds.worked(endpoint, EngineTotals(prompt_tokens=tokens, finished=20), 1)
        await asyncio.sleep(0.02)
    assert setting.matched(prompt(1, 2, 3)) == {}


async def test_a_worker_that_starts_later_is_told_everything(setting, publishers, ipc, monkeypatch):
    monkeypatch.setattr(kv_feeds, "_SNAPSHOT_NAMES", 3)
    publisher = publishers(*ipc)
    publisher.publish(stored(*range(20)))
    setting.publishes(publisher)
    await setting.follow()
    await until(lambda: setting.states() == ["complete"])
    newcomer = CacheWatch()
    newcomer.declare({"pool": Pool("pool", tuple(setting.endpoints))})
    for word in setting.feeds.joined():
        newcomer.hear(word)
    index = newcomer.index("pool")
    assert index.match(prompt(*range(21))) == {b"pool/0": 20}
    assert newcomer.held() == {"pool/0": 10}
    assert not index.partial


async def test_an_endpoint_that_leaves_is_forgotten_and_one_that_stays_is_told_again(
    setting, publishers, ipc
):
    publisher = publishers(*ipc)
    publisher.publish(stored(1, 2))
    setting.publishes(publisher)
    await setting.follow()
    await until(lambda: setting.states() == ["complete"])
    setting.caches.hear(kv_feeds.BlocksHeld(b"pool/0", is_followed=False))
    await setting.feeds.apply(setting.endpoints)
    assert setting.matched(prompt(1, 2, 3)) == {"pool/0": 2}
    await setting.feeds.apply([])
    assert setting.matched(prompt(1, 2, 3)) == {}
    assert setting.feeds.view(setting.endpoints[0]) == {}


@pytest.mark.parametrize(
    ("sources", "why"),
    [
        ({}, "publishes no KV events"),
        ({"0": {"endpoint": "ipc:///a"}, "1": {"endpoint": "ipc:///b"}}, "set data_parallel_ranks"),
    ],
)
async def test_why_an_engine_is_not_followed_is_told_once(setting, caplog, sources, why):
    setting.engine.sources = sources
    await setting.follow()
    await until(lambda: why in caplog.text)
    await asyncio.sleep(0.2)
    assert caplog.text.count(why) == 1
    assert setting.states() == ["waiting"]


async def test_a_publisher_that_connects_is_waited_for(setting, publishers):
    """Given a loopback address vLLM does not bind it, but connects to it."""
    address = f"tcp://127.0.0.1:{free_port()}"
    setting.engine.sources = {"0": {"endpoint": address}}
    await setting.follow()
    publisher = publishers(address, connects=True)
    deadline = time.monotonic() + 60
    while setting.matched(prompt(1, 2, 3)) != {"pool/0": 2}:
        assert time.monotonic() < deadline
        publisher.publish(stored(1, 2))
        await asyncio.sleep(0.05)
