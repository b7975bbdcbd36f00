"""Pools whose endpoints are looked up: what is placed, when it changes, and what stays when nobody answers."""

import asyncio

import pytest

from backends.discovery.found import DiscoveryError, Found
from gateway import discovering
from gateway.config import Config
from gateway.discovering import Discovering

A, B = Found("a", "http://10.0.0.1:8000/v1"), Found("b", "http://10.0.0.2:8000/v1")


class Source:
    """A finder that says what it is told; an error is raised."""

    def __init__(self):
        self.words = asyncio.Queue()
        self.followers = 0

    def say(self, *found):
        self.words.put_nowait(found)

    def fail(self, problem):
        self.words.put_nowait(DiscoveryError(problem))

    async def follow(self):
        self.followers += 1
        while True:
            word = await self.words.get()
            if isinstance(word, Exception):
                raise word
            yield word


class Service:
    """A Discovering and who listens to it."""

    def __init__(self):
        self.source = Source()
        self.changes = asyncio.Queue()
        self.discovering = Discovering(lambda: self.changes.put_nowait(None), lambda _: self.source)

    async def changed(self):
        await asyncio.wait_for(self.changes.get(), 30)

    def urls(self):
        return [member.base_url for member in self.discovering.placed()["gpu"].members]


@pytest.fixture
async def service():
    service = Service()
    yield service
    await service.discovering.stop()


def config(every_s=0.05, **pool):
    found = {"discovery": {"file": {"path": "/nowhere"}, "every_s": every_s}, **pool}
    return Config.model_validate({"pools": {"gpu": found, "other": {"endpoints": ["http://o/v1"]}}})


async def test_the_first_answer_is_there_before_the_workers_begin(service):
    service.source.say(A)
    await service.discovering.apply(config())
    assert service.urls() == [A.url]
    assert service.changes.empty()
    assert service.discovering.placed().keys() == {"gpu"}


async def test_a_change_is_told_once_and_the_same_answer_never(service):
    service.source.say(A)
    await service.discovering.apply(config())
    service.source.say(A)
    service.source.say(A, B)
    await service.changed()
    assert sorted(service.urls()) == [A.url, B.url]
    assert service.changes.empty()


async def test_what_was_found_stands_while_its_source_fails_and_the_source_is_asked_again(service):
    service.source.say(A)
    await service.discovering.apply(config())
    service.source.fail("nobody answers")
    service.source.fail("nobody answers")
    service.source.say(B)
    await service.changed()
    assert service.urls() == [B.url]
    assert service.source.followers == 3


async def test_a_source_that_fails_from_the_start_holds_nobody_up(service):
    service.source.fail("nobody answers")
    await service.discovering.apply(config())
    assert service.urls() == []
    (view,) = service.discovering.view()
    assert (view["problem"], view["endpoints"], view["answer_age_s"]) == ("nobody answers", 0, None)
    service.source.say(A)
    await service.changed()
    assert service.discovering.view()[0]["problem"] == ""


async def test_a_source_that_says_nothing_is_waited_for_only_so_long(service, monkeypatch):
    monkeypatch.setattr(discovering, "FIRST_S", 0.05)
    await service.discovering.apply(config())
    assert service.urls() == []
    service.source.say(A)
    await service.changed()
    assert service.urls() == [A.url]


async def test_a_reload_keeps_what_is_looked_for_already_and_ends_what_is_not(service):
    service.source.say(A)
    await service.discovering.apply(config())
    await service.discovering.apply(config())
    assert service.source.followers == 1
    service.source.say(B)
    await service.discovering.apply(config(every_s=0.06))
    assert service.source.followers == 2
    assert service.urls() == [B.url]
    await service.discovering.apply(Config.model_validate({}))
    assert service.discovering.placed() == {}


async def test_the_pools_ranks_are_those_of_an_address_that_says_nothing(service):
    service.source.say(A, B._replace(ranks=3))
    await service.discovering.apply(config(data_parallel_ranks=2))
    assert len(service.urls()) == 5
