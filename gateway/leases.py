"""The worker's conversation with the store of limits: one update under way at a time, all that waits in the next.

Owns when the store is spoken to and who waits for its answer; what is said is `policies.limits.holding`. Invariants:
a request that was granted something and no longer waits for it gives it back; after `stop` the store has every
unit that was spent and holds nothing of this worker.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

from gateway.stores.limit_store import LimitStore, StoreAwayError
from policies.exchange import Exchange
from policies.limits.account import Account
from policies.limits.holding import MAX_GROUPS, Group, Holding, Outcome
from policies.limits.messages import Reply
from policies.limits.refusals import refuse, unavailable
from policies.verdict import Denial

Observe = Callable[[Sequence[Account]], None]

_POST_S: Final = 0.2  # what was spent reaches the store after so long at most
_BEAT_S: Final = 1.0  # the store hears from a worker at least so often
_RETRY_S: Final = 0.5
_STOP_S: Final = 2.0

_log = logging.getLogger(__name__)
_Answer = Outcome | StoreAwayError


class Leases:
    """One per worker. `observe` is shown the accounts the store has just spoken of."""

    def __init__(
        self, open_store: Callable[[], LimitStore], holding: Holding, observe: Observe | None = None
    ) -> None:
        self.holding = holding
        self.updates = 0
        self.failures = 0
        self._open_store = open_store
        self._store: LimitStore | None = None
        self._observe = observe
        self._waiting: list[tuple[Group, asyncio.Future[_Answer]]] = []
        self._asked: list[asyncio.Future[_Answer]] = []  # of the update under way, group by group
        self._is_wanted = asyncio.Event()
        self._is_stopping = False
        self._heard_at = 0.0
        self._away_until = 0.0  # until then nobody waits for a store that did not answer
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Before the first limit is in force; once is enough. What opening the store raises is passed on."""
        if self._task is None:
            self._store = self._open_store()
            # Until the store says what time it is there.
            self.holding.set_time(time.time_ns() // 1000, time.perf_counter())
            self._is_wanted.set()
            self._task = asyncio.get_running_loop().create_task(self._converse(), name="leases")

    def wake(self) -> None:
        """The store should hear from us at the end of this turn."""
        self._is_wanted.set()

    async def obtain(self, exchange: Exchange) -> Denial | None:
        """Asks the store for what the exchange lacks, all or nothing; afterwards it is among what it has taken."""
        group = tuple(exchange.lacks)
        exchange.lacks = ()
        if self._task is None or self._task.done() or time.perf_counter() < self._away_until:
            return unavailable()
        future: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((group, future))
        self._is_wanted.set()
        try:
            answer = await future
        except asyncio.CancelledError:
            # Cancelled in the very turn in which it was granted: settle gives it back.
            if future.done() and not future.cancelled() and future.result() is None:
                exchange.taken = (*exchange.taken, *group)
            raise
        if answer is None:
            exchange.taken = (*exchange.taken, *group)
            return None
        if isinstance(answer, StoreAwayError):
            return unavailable()
        return refuse(*answer, self.holding.now_us(time.perf_counter()))

    async def stop(self) -> None:
        """Posts what was spent, gives back what is held; when the store is away, it forgets us in time."""
        self._is_stopping = True
        self._is_wanted.set()
        if self._task is not None:
            done, _ = await asyncio.wait({self._task}, timeout=_STOP_S)
            if not done:
                self._task.cancel()
                await asyncio.wait({self._task})
        if self._store is not None:
            await self._store.close()

    async def _converse(self) -> None:
        while not self._is_stopping:
            try:
                await self._turn()
            except Exception:  # noqa: BLE001 - whoever waits must be told, and the next update may do
                _log.exception("limits: an update failed through a bug")
                self._fail_asked(StoreAwayError("a bug"))
                await asyncio.sleep(_RETRY_S)
        try:
            if self.holding.sent is not None:
                await self._say()
            self.holding.tell_all()
            self.holding.compose([], time.perf_counter(), is_last=True)
            await self._say()
        except StoreAwayError as error:
            _log.warning("limits: the store is away at the end: %s", error)

    async def _turn(self) -> None:
        """Waits until there is something to say, says it, hands out the answers."""
        await self._reason()
        now = time.perf_counter()
        holding = self.holding
        if now - self._heard_at >= _BEAT_S:
            holding.tell_all()
            holding.forget_idle(now)
        if holding.sent is None:
            self._compose(now)
        try:
            outcomes = await self._say()
        except StoreAwayError as error:
            self.failures += 1
            self._away_until = time.perf_counter() + _RETRY_S
            self._fail_asked(error)
            await asyncio.sleep(_RETRY_S)
            return
        self._hand_out(outcomes)

    def _compose(self, now: float) -> None:
        waiting = [(group, future) for group, future in self._waiting if not future.done()]
        now_asked, self._waiting = waiting[:MAX_GROUPS], waiting[MAX_GROUPS:]
        if self._waiting:
            self._is_wanted.set()
        self._asked = [future for _, future in now_asked]
        self.holding.compose([group for group, _ in now_asked], now)

    async def _reason(self) -> None:
        """Until something is wanted, something spent is old enough, or it is time to be heard of."""
        loop = asyncio.get_running_loop()
        due_at = self._heard_at + (_BEAT_S if self.holding.is_quiet else _POST_S)
        delay_s = due_at - time.perf_counter()
        if delay_s > 0 and not self._is_wanted.is_set():
            timer = loop.call_later(delay_s, self._is_wanted.set)
            await self._is_wanted.wait()
            timer.cancel()
        # What else comes in this turn of the loop goes along.
        await asyncio.sleep(0)
        self._is_wanted.clear()

    async def _say(self) -> list[Outcome]:
        """Sends the update until the store knows who says it. StoreAwayError: it waits to be said again."""
        holding, store = self.holding, self._store
        assert store is not None
        while True:
            update = holding.sent
            assert update is not None
            sent_at = time.perf_counter()
            reply: Reply = await store.update(update)
            self.updates += 1
            self._heard_at = now = time.perf_counter()
            holding.set_time(reply.now_us, now)
            outcomes = holding.take_in(reply, sent_at)
            if outcomes is not None:
                if self._observe is not None:
                    self._observe(holding.mentioned)
                return outcomes
            _log.info("limits: the store did not know this worker; beginning again")

    def _hand_out(self, outcomes: list[Outcome]) -> None:
        asked, self._asked = self._asked, []
        groups = self.holding.granted
        for future, outcome, group in zip(asked, outcomes, groups, strict=False):
            if not future.done():
                future.set_result(outcome)
            elif outcome is None:
                # Whoever asked has gone, or was told that the store is away.
                for account, units in group:
                    account.free += units
                    self.holding.touch(account)
                self._is_wanted.set()

    def _fail_asked(self, error: StoreAwayError) -> None:
        """Nobody waits for a store that is away; what it grants late is given back."""
        for future in self._asked:
            if not future.done():
                future.set_result(error)
        waiting, self._waiting = self._waiting, []
        for _, future in waiting:
            if not future.done():
                future.set_result(error)
