"""What the parent believes of endpoints, while configurations and engines change under it."""

import asyncio

from backends.member import Member
from gateway.config import Config
from gateway.control import Membership
from gateway.exposition import Page
from gateway.kv_feeds import KvFeeds
from gateway.patrol import Patrol
from gateway.placed import PlacedConfig, PlacedPool

CONFIG = Config.model_validate({"pools": {"gpu": {"vllm": {"model": "org/tiny", "gpus": "none"}}}})


def placed(*, is_open: bool) -> PlacedConfig:
    member = Member(name="gpu/0", base_url="http://127.0.0.1:9/v1", is_open=is_open)
    return PlacedConfig.of(CONFIG, {"gpu": PlacedPool(members=(member,))})


async def test_an_engine_that_opens_while_a_configuration_is_applied_is_open():
    page = Page("test")
    told = []
    patrol = Patrol(lambda word, but: told.append(word), page.probes, KvFeeds(told.append, page.counter))
    await patrol.apply(placed(is_open=False))
    applying = asyncio.ensure_future(patrol.apply(placed(is_open=False)))
    await asyncio.sleep(0)  # it waits for what it has ended
    assert not applying.done()
    patrol.open("gpu/0", is_open=True)
    await applying
    assert Membership("gpu/0", is_open=True) in patrol.joined("w0-1")
    await patrol.stop()
