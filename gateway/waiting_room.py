"""Requests that wait because every endpoint of a pool is full: a future each, and one timer while there are any.

`policies.placement.room` says who is next. Whoever is let in holds its slot from that moment, so that nobody who
comes by in between can take it. Whoever is cancelled (the client went, the gateway drains) has left at once.
"""

import asyncio
from collections.abc import Callable
from time import perf_counter
from typing import Final

from backends.load import EndpointLoad
from policies.exchange import Exchange
from policies.placement.hold import Hold
from policies.placement.place import Choice
from policies.placement.priority import PriorityConfig
from policies.placement.room import Room, Throughput, Waiter

# What frees no slot of ours is seen this often: a scraped figure, an endpoint that is well again, a deadline.
_TICK_S: Final = 0.05

Choose = Callable[[Exchange, float], Choice]


class _Turn:
    """One who waits, and how it is told."""

    __slots__ = ("choose", "exchange", "told")

    def __init__(
        self, exchange: Exchange, choose: Choose, told: "asyncio.Future[tuple[Choice, Hold] | None]"
    ) -> None:
        self.exchange = exchange
        self.choose = choose
        self.told = told


class WaitingRoom:
    """The rooms of one worker, by pool. `counts` are since its start."""

    def __init__(self, classes: tuple[PriorityConfig, ...]) -> None:
        self.counts = {"served": 0, "timed_out": 0, "left": 0, "turned_away": 0}
        self.waited_s = 0.0
        self._classes = classes
        self._rooms: dict[str, Room] = {}
        self._throughput: dict[str, Throughput] = {}
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, classes: tuple[PriorityConfig, ...]) -> None:
        """For those that come from now on; rooms with somebody in them stay as they are until they are empty."""
        self._classes = classes
        self._rooms = {pool: room for pool, room in self._rooms.items() if len(room)}

    def is_awaited(self, pool: str, priority: int) -> bool:
        """Whether somebody waits whom a newcomer of this priority must not pass."""
        room = self._rooms.get(pool)
        return room is not None and room.ahead(priority) > 0

    def sizes(self) -> dict[str, int]:
        """How many wait, by pool."""
        return {pool: len(room) for pool, room in self._rooms.items()}

    def wait_s(self, pool: str, priority: int, endpoints: tuple[EndpointLoad, ...]) -> float:
        """When one that came now might be served."""
        room, throughput = self._rooms.get(pool), self._throughput.get(pool)
        ahead = room.ahead(priority) if room is not None else 0
        return (throughput or Throughput()).wait_s(ahead, sum(endpoint.in_flight for endpoint in endpoints))

    async def wait(self, exchange: Exchange, pool: str, choose: Choose) -> Choice | None:
        """The choice that has room now; None: out of time, or too many wait already.

        The caller dispatches before it awaits anything else.
        """
        room = self._rooms.get(pool)
        if room is None:
            room = self._rooms[pool] = Room(self._classes)
        caller = exchange.caller
        tenant = (caller.team or caller.key_id) if caller is not None else ""
        entered_at = perf_counter()
        turn = _Turn(exchange, choose, asyncio.get_running_loop().create_future())
        waiter = room.enter(tenant, exchange.priority, entered_at, turn)
        if waiter is None:
            self.counts["turned_away"] += 1
            return None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)
        try:
            served = await turn.told
        except asyncio.CancelledError:
            self.counts["left"] += 1
            room.leave(waiter)
            if not turn.told.cancelled() and (lost := turn.told.result()) is not None:
                lost[1].release()  # let in and gone in the same turn of the loop
                self.freed(pool)
            raise
        finally:
            exchange.waited_s += perf_counter() - entered_at
        if served is None:
            self.counts["timed_out"] += 1
            return None
        choice, slot = served
        slot.release()
        self.counts["served"] += 1
        self.waited_s += exchange.waited_s
        return choice

    def ended(self, pool: str, after_s: float) -> None:
        """A request has left an endpoint of this pool, so long after it was sent there."""
        throughput = self._throughput.get(pool)
        if throughput is None:
            throughput = self._throughput[pool] = Throughput()
        throughput.ended(after_s)
        if pool in self._rooms:
            self.freed(pool)

    def freed(self, pool: str) -> None:
        """There may be room again: lets in who is next, and whom there is room for after that."""
        room = self._rooms.get(pool)
        if room is None or not len(room):
            return
        now = perf_counter()
        while self._let_in(room, now):
            pass

    def _let_in(self, room: Room, now: float) -> bool:
        """The first of those in front for whom there is room: a lower class may be held back by a reserve of others."""
        tried: set[int] = set()
        for waiter in room.order(now):
            turn = _turn_of(waiter)
            if turn.told.done():  # cancelled just now
                room.leave(waiter)
                return True
            if turn.exchange.priority in tried:
                continue
            tried.add(turn.exchange.priority)
            choice = turn.choose(turn.exchange, now)
            if choice.candidates and not choice.is_full:
                room.serve(waiter)
                turn.told.set_result((choice, Hold(choice.candidates[0].endpoint, 0)))
                return True
        return False

    def _tick(self) -> None:
        self._timer = None
        now = perf_counter()
        waiting = 0
        for pool, room in self._rooms.items():
            for waiter in room.overdue(now):
                room.leave(waiter)
                told = _turn_of(waiter).told
                if not told.done():
                    told.set_result(None)
            self.freed(pool)
            waiting += len(room)
        if waiting:
            self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)


def _turn_of(waiter: Waiter) -> _Turn:
    assert isinstance(waiter.item, _Turn)
    return waiter.item
