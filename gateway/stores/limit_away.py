"""A store of limits that always answers: when the real one does not, by what each counter says to do meanwhile.

Owns the time a store has, the breaker, and the answers in the store's absence. Invariants: an update waits for the store
at most `timeout_s`, and not at all while it is away; what was posted meanwhile is posted once when it is back. The
holder is then told to begin again, so that the store learns what it has; under its old name it holds nothing any more.
"""

import asyncio
import logging
import random
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from msgspec.structs import replace

from gateway.stores.limit_store import LimitStore, StoreAwayError
from policies.limits.messages import Counter, Reading, Reply, Update
from policies.limits.substitute import Substitute

TIMEOUT_S: Final = 0.1
# Turns of the loop in which an answer that has arrived is read: a loop that was late must not blame the store.
_LATE_TURNS: Final = 5
PROBE_S: Final = (
    0.0,
    0.1,
    0.25,
    0.5,
    1.0,
    2.0,
)  # between two probes, the last for ever; half of it is chance

_T = TypeVar("_T")

_log = logging.getLogger(__name__)


class AwayHealth(NamedTuple):
    """Counters since the start. `is_away` is of this moment; `away_s` counts an absence under way, too."""

    is_away: bool
    absences: int
    away_s: float
    answers: int  # given in the store's place
    last_error: str


class GuardedLimitStore:
    """A LimitStore around another, whose StoreAwayErrors end here."""

    def __init__(
        self, store: LimitStore, *, timeout_s: float = TIMEOUT_S, probe_s: Sequence[float] = PROBE_S
    ) -> None:
        self._store = store
        self._probe_s = probe_s
        self._timeout_s = timeout_s
        self._substitute = Substitute()
        self._offset_us = 0  # the store's time less ours
        self._doubt: Update | None = None  # sent, and nobody knows whether it was applied
        self._ended: list[Update] = []  # the last of each name before: what it holds is to be given back
        self._probing: asyncio.Task[None] | None = None
        self._must_begin_again = False
        self._away_at = 0.0
        self._absences = self._answers = 0
        self._away_s = 0.0
        self._last_error = ""

    async def update(self, update: Update) -> Reply:
        if self._probing is not None and not self._probing.done():
            return self._answer(update)
        if self._must_begin_again:
            self._must_begin_again = False
            return Reply(self._now_us(), is_known=False)
        said = self._substitute.with_unposted(update)
        try:
            reply = await self._in_time(self._store.update(said))
        except StoreAwayError as error:
            self._leave(said, str(error))
            return self._answer(replace(update, posts=()))  # they are in doubt, not waiting
        if not reply.is_known:
            return reply
        self._substitute.observe(said, reply)
        self._offset_us = reply.now_us - time.time_ns() // 1000
        while self._ended and await self._give_back(self._ended[-1]):
            self._ended.pop()
        return reply if said is update else replace(reply, readings=reply.readings[: len(update.counters)])

    async def read(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]:
        if self._probing is None or self._probing.done():
            try:
                return await self._in_time(self._store.read(counters))
            except StoreAwayError as error:
                self._last_error = str(error)
        return self._now_us(), [self._substitute.reading(counter) for counter in counters]

    async def close(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait({self._probing})
        await self._store.close()

    def health(self) -> AwayHealth:
        is_away = self._probing is not None and not self._probing.done()
        away_s = self._away_s + (time.perf_counter() - self._away_at if is_away else 0.0)
        return AwayHealth(is_away, self._absences, away_s, self._answers, self._last_error)

    async def _in_time(self, work: Coroutine[Any, Any, _T]) -> _T:
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task}, timeout=self._timeout_s)
            for _ in range(_LATE_TURNS):
                if task.done():
                    return task.result()
                await asyncio.sleep(0)
        finally:
            task.cancel()
        raise StoreAwayError("no answer in time")

    def _now_us(self) -> int:
        return time.time_ns() // 1000 + self._offset_us

    def _leave(self, doubt: Update, error: str) -> None:
        self._doubt = doubt
        self._last_error = error
        self._absences += 1
        self._away_at = time.perf_counter()
        self._substitute.begin(doubt, self._now_us())
        _log.warning("limits: the store is away (%s)", error)
        self._probing = asyncio.create_task(self._probe(), name="limits-probe")

    def _answer(self, update: Update) -> Reply:
        self._answers += 1
        return self._substitute.answer(update, self._now_us())

    async def _probe(self) -> None:
        """Repeats what is in doubt until the store says what became of it."""
        attempt = 0
        while True:
            delay_s = self._probe_s[min(attempt, len(self._probe_s) - 1)]
            await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
            attempt += 1
            doubt = self._doubt
            assert doubt is not None
            try:
                reply = await self._in_time(self._store.update(doubt))
            except StoreAwayError as error:
                self._last_error = str(error)
                continue
            except Exception:  # noqa: BLE001 - whatever it is, the next probe may do
                _log.exception("limits: a probe failed through a bug")
                continue
            break
        away_s = time.perf_counter() - self._away_at
        self._away_s += away_s
        _log.warning("limits: the store is back", extra={"duration_ms": round(away_s * 1000)})
        self._substitute.end(is_posted=reply.is_known or reply.was_applied)
        # Its holds stand until those of the new name do: nobody is to get them in between.
        if reply.is_known and not doubt.is_last:
            self._ended.append(doubt)
        self._doubt = None
        self._must_begin_again = True

    async def _give_back(self, last: Update) -> bool:
        """False: not now; it is tried again with the next update, and lapses by itself if there is none in time."""
        ending = Update(last.holder, last.number + 1, 1, is_last=True)
        try:
            await self._in_time(self._store.update(ending))
        except StoreAwayError as error:
            _log.info("limits: the holds before the absence are not given back yet (%s)", error)
            return False
        return True
