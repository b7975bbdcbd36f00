"""The parent's following of KV events: which endpoint holds which blocks, told to every worker.

One task for each endpoint of the pools that follow events: asks the engine where it publishes (`/kv_event_sources`),
subscribes, repairs gaps, and drops what it knows when it cannot: a wrong index is worse than none. Here and not in
the workers, so that an engine serves one subscriber, a block is read once, and a worker that starts later gets all of
it (docs/decisions/0029). Refuses to decide: what the blocks mean for a request the workers know.
"""

import asyncio
import ipaddress
import logging
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, Final, Literal

import msgspec
from prometheus_client import Counter

from backends import probes
from backends.engine_load import EngineTotals
from backends.kv_blocks import Change
from backends.kv_stream import KvStream
from backends.pool import Endpoint
from gateway.control import BlocksHeld, OfEndpoint

# How an endpoint's events are doing. partial: it had blocks before we listened, or told of too many since.
State = Literal["waiting", "complete", "partial", "silent"]

_ASK_S: Final = 5.0
_RETRY_S: Final = 2.0
# An engine that computes whole blocks and tells of none for so long does not publish.
_SILENT_S: Final = 10.0
# An engine may count what it computed as much later than it told of it.
_SETTLE_S: Final = 5.0
# Where the size of a block is not known yet: the largest that is in use.
_LARGE_BLOCK: Final = 256
_SNAPSHOT_NAMES: Final = 250_000  # in one message

_log = logging.getLogger(__name__)


class _Source(msgspec.Struct):
    endpoint: str
    replay_endpoint: str | None = None
    topic: str = ""


_sources: Final = msgspec.json.Decoder(dict[str, _Source])


class _Feed:
    """One endpoint's."""

    def __init__(self, endpoint: Endpoint, tell: Callable[[BlocksHeld], None], gaps: Counter) -> None:
        self.endpoint = endpoint
        self.stream = KvStream()
        self.state: State = "waiting"
        self.messages = 0
        self._tell = tell
        self._gaps = gaps
        self._heard_at = 0.0
        self._base: EngineTotals | None = None  # a moment after something was last heard
        self._why = ""
        self._is_silent = False
        self.task = asyncio.create_task(self._follow(), name=f"KV events of {endpoint.name}")

    def snapshot(self) -> Iterable[BlocksHeld]:
        """All of it, for a worker that knows nothing."""
        if self.state not in ("complete", "partial"):
            return
        names = array("Q", self.stream.blocks.names())
        yield self._held(is_reset=True)
        for start in range(0, len(names), _SNAPSHOT_NAMES):
            yield self._held(added=names[start : start + _SNAPSHOT_NAMES])

    def worked(self, totals: EngineTotals, in_engine: int, now: float) -> None:
        """What the engine has done so far, by its own count. Blocks that were computed must have been told of."""
        base = self._base
        if self.state not in ("complete", "partial") or now - self._heard_at < _SETTLE_S:
            return
        if base is None or totals.finished < base.finished:
            self._base = totals
            return
        block = self.stream.blocks.block_size or _LARGE_BLOCK
        # Of each request less than a block may have gone untold.
        requests = totals.finished - base.finished + in_engine
        due = totals.computed_tokens - base.computed_tokens - (requests + 1) * block
        if due > 0 and now - self._heard_at > _SILENT_S:
            self._is_silent = True

    async def _follow(self) -> None:
        while True:
            try:
                await self._follow_once()
            except Exception as error:  # noqa: BLE001 - one bad round must not be the last one
                self._complain(f"following its KV events failed: {type(error).__name__}")
                _log.debug("KV events", exc_info=error)
            self._lose("silent" if self._is_silent else "waiting")
            await asyncio.sleep(_SILENT_S if self._is_silent else _RETRY_S)

    async def _follow_once(self) -> None:
        """Until the publisher goes, or says nothing."""
        source = await self._discover()
        if source is None:
            return
        where, is_bound = _reachable(source.endpoint, self.endpoint)
        replay = (
            None if source.replay_endpoint is None else _reachable(source.replay_endpoint, self.endpoint)[0]
        )
        subscribe = import_module("gateway.kv_subscription").Subscription
        async with subscribe(where, replay, source.topic, is_bound=is_bound) as subscription:
            if not await self._repair(subscription, "start"):
                return
            self._is_silent = False
            while not subscription.is_lost:
                for message in await subscription.received():
                    self.messages += 1
                    self._heard_at, self._base = time.perf_counter(), None
                    change = self.stream.take(message)
                    if change is not None:
                        self._pass_on(change)
                    elif not await self._repair(subscription, "gap"):
                        return
                if self._is_silent:
                    self._complain("it computes, and its KV events do not come")
                    return

    async def _discover(self) -> _Source | None:
        """Where this endpoint publishes, by its own word."""
        asked = await probes.look(self.endpoint, "/kv_event_sources", _ASK_S)
        if not asked.is_ok:
            if asked.status:
                self._complain("it does not say where it publishes KV events (/kv_event_sources)")
            return None
        try:
            sources = _sources.decode(asked.body)
        except msgspec.DecodeError:
            sources = {}
        rank = self.endpoint.rank
        if rank is not None:
            found = sources.get(str(rank))
        else:
            found = next(iter(sources.values())) if len(sources) == 1 else None
        if found is None:
            self._complain(
                "it publishes no KV events (--kv-events-config)"
                if not sources or rank is not None
                else "it has several ranks behind its address: set data_parallel_ranks"
            )
        return found

    async def _repair(self, subscription: Any, why: Literal["start", "gap"]) -> bool:
        """What is missing, had again; False: the publisher does not answer."""
        stream = self.stream
        if not subscription.can_repeat:
            change = stream.restart(None)
            self._count(why, "dropped")
        else:
            repeated = await subscription.repeated(stream.repair_from)
            resumed = None if repeated is None else stream.resume(repeated)
            self._count(why, "filled" if resumed is not None else "dropped")
            if resumed is None:
                if stream.repair_from:
                    repeated = await subscription.repeated(0)
                if repeated is None:
                    return False
                change = stream.restart(repeated)
            else:
                change = resumed
        if why == "start":
            # Workers forgot it when it was lost: they get all that is held, not only what changed.
            change = Change(array("Q", stream.blocks.names()), (), is_cleared=True)
        self._heard_at, self._base = time.perf_counter(), None
        self._pass_on(change)
        self._why = ""
        return True

    def _count(self, why: str, outcome: str) -> None:
        if why == "gap":
            self._gaps.labels(self.endpoint.name, outcome).inc()
            _log.warning("KV events are missing", extra={"endpoint": self.endpoint.name, "outcome": outcome})

    def _pass_on(self, change: Change) -> None:
        state: State = "complete" if self.stream.is_complete else "partial"
        is_news = state != self.state
        self.state = state
        if change.added or change.removed or change.is_cleared or is_news:
            self._tell(self._held(change.added, change.removed, is_reset=change.is_cleared))

    def _held(
        self, added: Sequence[int] = (), removed: Sequence[int] = (), *, is_reset: bool = False
    ) -> BlocksHeld:
        blocks = self.stream.blocks
        return BlocksHeld(
            self.endpoint.hash_key,
            array("Q", added).tobytes(),
            array("Q", removed).tobytes(),
            is_reset=is_reset,
            block_size=blocks.block_size,
            is_partial=not self.stream.is_complete,
            adapters=sorted(blocks.adapters),
        )

    def _lose(self, state: State) -> None:
        was_followed = self.state in ("complete", "partial")
        self.state = state
        if was_followed:
            self._tell(BlocksHeld(self.endpoint.hash_key, is_followed=False))
            _log.warning(
                "the index of an endpoint's cache is dropped", extra={"endpoint": self.endpoint.name}
            )

    def _complain(self, why: str) -> None:
        """Once for each reason."""
        if why != self._why:
            self._why = why
            _log.warning("an endpoint's cache is not known: %s", why, extra={"endpoint": self.endpoint.name})


class KvFeeds:
    """Of all endpoints whose events are followed. `tell` reaches every worker."""

    def __init__(
        self,
        tell: Callable[[OfEndpoint, str], None],
        counter: Callable[[str, str, Sequence[str]], Counter],
    ) -> None:
        self._tell = tell
        self._gaps = counter(
            "headgate_kv_event_gaps_total",
            "Gaps in an endpoint's KV events: filled by repetition, or dropped with all that was known.",
            ["endpoint", "outcome"],
        )
        self._feeds: dict[bytes, _Feed] = {}

    async def apply(self, endpoints: Iterable[Endpoint]) -> None:
        """Those that are to be followed now. What is known of one that stays, stays, and is told again."""
        wanted = {endpoint.hash_key: endpoint for endpoint in endpoints}
        gone = [feed for key, feed in self._feeds.items() if wanted.get(key) is not feed.endpoint]
        await _stop(gone)
        for feed in gone:
            self._tell(BlocksHeld(feed.endpoint.hash_key, is_followed=False), "")
        self._feeds = {key: feed for key, feed in self._feeds.items() if feed not in gone}
        for feed in self._feeds.values():
            for word in feed.snapshot():
                self._tell(word, "")
        for key, endpoint in wanted.items():
            if key not in self._feeds:
                self._feeds[key] = _Feed(endpoint, lambda word: self._tell(word, ""), self._gaps)

    async def stop(self) -> None:
        await _stop(list(self._feeds.values()))
        self._feeds = {}

    def joined(self) -> list[OfEndpoint]:
        """For a worker that has just begun."""
        return [word for feed in self._feeds.values() for word in feed.snapshot()]

    def worked(self, endpoint: Endpoint, totals: EngineTotals, in_engine: int) -> None:
        """What an engine said of itself just now; `in_engine` are its requests, waiting or not."""
        feed = self._feeds.get(endpoint.hash_key)
        if feed is not None:
            feed.worked(totals, in_engine, time.perf_counter())

    def view(self, endpoint: Endpoint) -> dict[str, Any]:
        """For operators: how its events are doing, and how many blocks are known. Empty: they are not followed."""
        feed = self._feeds.get(endpoint.hash_key)
        if feed is None:
            return {}
        return {"kv_events": feed.state, "kv_blocks": len(feed.stream.blocks), "kv_messages": feed.messages}


async def _stop(feeds: Sequence[_Feed]) -> None:
    for feed in feeds:
        feed.task.cancel()
    await asyncio.gather(*(feed.task for feed in feeds), return_exceptions=True)


def _reachable(address: str, endpoint: Endpoint) -> tuple[str, bool]:
    """A publisher's address as we reach it, and whether we must bind it: given a loopback address, vLLM connects."""
    if not address.startswith("tcp://"):
        return address, False
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if host in ("*", "[::]", "0.0.0.0"):  # noqa: S104 - the engine's choice
        there = endpoint.connections.origin.host
        return f"tcp://{f'[{there}]' if ':' in there else there}:{port}", False
    try:
        is_loopback = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    return address, is_loopback
