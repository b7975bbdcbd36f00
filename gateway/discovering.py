"""Endpoints that are looked up: which pools have them, what was found last, and who is told when that changes.

One task for each such pool, in the parent. What was found stands while its source cannot be asked: an engine is not gone
because nobody can say where it is. Refuses to know how a source is asked (`backends.discovery`) and what workers make of it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, Protocol

from backends.config import PoolConfig
from backends.discovery.config import DiscoveryConfig
from backends.discovery.dns import DnsFinder
from backends.discovery.found import DiscoveryError, Found, members_of
from backends.discovery.kubernetes import KubernetesFinder
from backends.member import Member
from gateway.config import Config
from gateway.listed_file import FileFinder
from gateway.placed import PlacedPool

# How long a start or reload waits for a first answer; without one it goes on, and the pool is empty until there is one.
FIRST_S: Final = 5.0
_SLOWEST_S: Final = 60.0

_log = logging.getLogger(__name__)


class Finder(Protocol):
    """One source."""

    def follow(self) -> AsyncIterator[tuple[Found, ...]]:
        """All endpoints there are, now and whenever that may have changed. DiscoveryError ends it."""


def finder(settings: DiscoveryConfig) -> Finder:
    """For the one source that is configured."""
    if settings.dns is not None:
        return DnsFinder(settings, settings.dns)
    if settings.file is not None:
        return FileFinder(settings, settings.file)
    assert settings.kubernetes is not None
    return KubernetesFinder(settings, settings.kubernetes)


class _Search:
    """One pool's."""

    def __init__(self, pool: str, settings: DiscoveryConfig, ranks: int) -> None:
        self.pool = pool
        self.settings = settings
        self.ranks = ranks
        self.members: tuple[Member, ...] = ()
        self.found_time: float | None = None  # of the latest answer
        self.problem = ""
        self.has_answered = asyncio.Event()  # or failed
        self.task: asyncio.Task[None] | None = None


class Discovering:
    """One per service. `changed` hears when a pool has other endpoints than before."""

    def __init__(
        self, changed: Callable[[], None], find: Callable[[DiscoveryConfig], Finder] = finder
    ) -> None:
        self._changed = changed
        self._find = find
        self._is_applying = False
        self._searches: dict[str, _Search] = {}

    async def apply(self, config: Config) -> None:
        """What is looked for from now on. What is looked for already stays as it is; `placed` has it all afterwards."""
        wanted = _wanted(config)
        before = self._searches
        self._is_applying = True
        self._searches = {}
        for name, (settings, ranks) in wanted.items():
            known = before.get(name)
            if known is not None and (known.settings, known.ranks) == (settings, ranks):
                self._searches[name] = known
            else:
                self._searches[name] = search = _Search(name, settings, ranks)
                search.task = asyncio.create_task(self._follow(search))
        await _end([search for name, search in before.items() if self._searches.get(name) is not search])
        waits = [search.has_answered.wait() for search in self._searches.values()]
        try:
            async with asyncio.timeout(FIRST_S):
                await asyncio.gather(*waits)
        except TimeoutError:
            _log.warning("some endpoints are not found yet; their pools begin without them")
        finally:
            self._is_applying = False

    def placed(self) -> dict[str, PlacedPool]:
        """By pool. A pool of which nothing is known yet is there, and empty."""
        return {name: PlacedPool(members=search.members) for name, search in self._searches.items()}

    def view(self) -> list[dict[str, Any]]:
        """For operators. No address."""
        now = time.time()
        return [
            {
                "pool": search.pool,
                "endpoints": len(search.members),
                "answer_age_s": None if search.found_time is None else round(now - search.found_time, 1),
                "problem": search.problem,
            }
            for search in self._searches.values()
        ]

    async def stop(self) -> None:
        searches, self._searches = list(self._searches.values()), {}
        await _end(searches)

    async def _follow(self, search: _Search) -> None:
        failures = 0
        while True:
            try:
                async for found in self._find(search.settings).follow():
                    failures = 0
                    self._take(search, found)
            except DiscoveryError as error:
                self._fail(search, str(error))
            except Exception:  # noqa: BLE001 - one pool's bug must not end the search for good
                _log.exception("a search for endpoints failed through a bug", extra={"pool": search.pool})
                self._fail(search, "a bug: the log says where")
            failures += 1
            await asyncio.sleep(min(search.settings.every_s * 2.0 ** min(failures - 1, 10), _SLOWEST_S))

    def _take(self, search: _Search, found: tuple[Found, ...]) -> None:
        if search.problem:
            _log.warning("endpoints are found again", extra={"pool": search.pool})
        search.found_time, search.problem = time.time(), ""
        ranked = [each._replace(ranks=search.ranks) if each.ranks == 1 else each for each in found]
        members = members_of(search.pool, ranked)
        is_other = members != search.members
        search.members = members
        search.has_answered.set()
        if is_other:
            _log.info("a pool has other endpoints", extra={"pool": search.pool, "count": len(members)})
            if not self._is_applying:
                self._changed()

    def _fail(self, search: _Search, problem: str) -> None:
        if problem != search.problem:
            _log.error(
                "endpoints cannot be looked up, those that are known stay: %s",
                problem,
                extra={"pool": search.pool},
            )
        search.problem = problem
        search.has_answered.set()


def _wanted(config: Config) -> dict[str, tuple[DiscoveryConfig, int]]:
    def of(pool: PoolConfig) -> tuple[DiscoveryConfig, int] | None:
        settings = pool.discovery if pool.enabled else None
        return None if settings is None else (settings, pool.data_parallel_ranks)

    return {name: wanted for name, pool in config.pools.items() if (wanted := of(pool)) is not None}


async def _end(searches: list[_Search]) -> None:
    tasks = [search.task for search in searches if search.task is not None]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks)
