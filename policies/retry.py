"""Whether a failed attempt may be followed by another, and after how long.

Only while nothing of an answer has been relayed (the send stage sees to that). Few attempts: a second one saves
a request from one bad endpoint, a third mostly adds load to a system in trouble. All of them together stay under
a share of the traffic, so that a pool that is down gets hardly more requests than one that is up. What a policy of
ours refused is never sent at all, so there is nothing to repeat.
"""

from typing import Final

from backends.errors import LOAD_STATUSES, UpstreamError

MAX_ATTEMPTS: Final = 2
MAX_CONNECT_ATTEMPTS: Final = 3  # nothing was sent, so another try cannot do the work twice
# Answers that another endpoint may not give: overload, a broken or draining server, a bad hop behind it.
RETRYABLE_STATUSES: Final = LOAD_STATUSES | {500, 502, 504}
# The key was refused, not the request: another one may do.
KEY_STATUSES: Final = frozenset({401, 403, 429})
BACKOFF_S: Final = 0.05
_SLOTS: Final = 10


def may_retry(attempts: int, failure: UpstreamError | int) -> bool:
    """`failure` is the error, or the status of the answer; `attempts` counts the failed one."""
    if isinstance(failure, int):
        return failure in RETRYABLE_STATUSES and attempts < MAX_ATTEMPTS
    if failure.kind == "total_timeout":
        return False
    return attempts < (MAX_ATTEMPTS if failure.sent else MAX_CONNECT_ATTEMPTS)


def backoff_s(attempts: int, draw: float) -> float:
    """Full jitter: anything up to a bound that doubles; `draw` is random, from 0 to 1.

    Short, because the next attempt goes elsewhere; not nothing, because all that one endpoint lost would come at once.
    """
    return draw * BACKOFF_S * 2.0 ** (attempts - 1)


class RetryBudget:
    """Retries of one pool: at most `share` of its requests of the last ten seconds, but always `floor`."""

    __slots__ = ("_requests", "_retries", "_slot", "floor", "share")

    def __init__(self, share: float = 0.2, floor: int = 3) -> None:
        self.share = share
        self.floor = floor
        self._slot = 0  # the second that is counted now
        self._requests = [0] * _SLOTS
        self._retries = [0] * _SLOTS

    def count(self, now: float) -> None:
        """A request has come, however often it will be sent."""
        slot = int(now)
        if slot != self._slot:
            self._advance(slot)
        self._requests[slot % _SLOTS] += 1

    def take(self, now: float) -> bool:
        """One retry, if there is any left."""
        self._advance(int(now))
        if sum(self._retries) >= max(self.floor, self.share * sum(self._requests)):
            return False
        self._retries[self._slot % _SLOTS] += 1
        return True

    def _advance(self, slot: int) -> None:
        for passed in range(max(self._slot + 1, slot - _SLOTS + 1), slot + 1):
            self._requests[passed % _SLOTS] = self._retries[passed % _SLOTS] = 0
        self._slot = max(slot, self._slot)
