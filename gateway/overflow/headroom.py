"""How many jobs of a lane may be started now: what is known of its model's pools, put together.

Interactive requests that wait for a pool close it at once. Else it is the least of what is idle in its engines, what the
account's rates leave, and the limit that is learned from refusals (`policies.placement.async_room`). However busy a pool
is, one job starts there now and then. Refuses to know jobs: it counts what it is told was started and has ended.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import Final, NamedTuple

from backends.pool import Pool
from gateway.overflow.config import QueueConfig
from gateway.runtime import Runtime
from policies.placement.async_room import (
    AsyncLimit,
    Ramp,
    RateReading,
    RateRoom,
    Trickle,
    idle_slots,
    is_congested,
    job_slots,
)

_OPENAI: Final = b"x-ratelimit-"
_ANTHROPIC: Final = b"anthropic-ratelimit-"
_SPAN_UNITS_S: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_UNKNOWN_RESET_S: Final = 1.0


class Room(NamedTuple):
    """So many jobs may be started at `pool`; `is_trickle`: although there is no room, so they must wait there."""

    slots: int
    pool: str
    is_trickle: bool = False


class _Gate:
    """What is learned of one pool."""

    def __init__(self, limit: AsyncLimit, trickle: Trickle, ramp: Ramp) -> None:
        self.limit = limit
        self.trickle = trickle
        self.ramp = ramp
        self.rates = RateRoom()


class Load(NamedTuple):
    """Our jobs by pool: all of them, and those that no endpoint counts yet."""

    running: dict[str, int]
    unsent: dict[str, int]


class Headroom:
    """One per worker. `waiting` says how many interactive requests wait for each pool; `processes`: how many of us;
    `want` is told of pools of ours that there are jobs for and none of whose engines takes requests."""

    def __init__(
        self,
        settings: Callable[[], QueueConfig],
        waiting: Callable[[], dict[str, int]],
        processes: int,
        want: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._waiting = waiting
        self._processes = processes
        self._want = want
        self._gates: dict[str, _Gate] = {}
        self.is_ramping = False  # a moment later there may be more room, without anything that would tell

    def room(self, lane: str, load: Load, runtime: Runtime, now: float) -> Room | None:
        """Of the lane's targets the first with room; None: there is none."""
        model = runtime.catalog.find(lane)
        if model is None:
            return Room(1, "")  # no longer served: to be run is how it learns that
        waiting = self._waiting()
        busy = None
        for target in model.targets:
            pool = target.pool
            if all(endpoint.is_draining for endpoint in pool.endpoints):
                self._want(pool.name)  # asleep, perhaps; a job that went there now would only wait elsewhere
                continue
            if runtime.health.is_down(pool.endpoints, now):
                continue
            gate = self._gate(pool.name, now, is_bounded=all(e.max_in_flight for e in pool.endpoints))
            count = self._count(pool, gate, load, now)
            if count > 0 and not waiting.get(pool.name):
                return Room(count, pool.name)
            if busy is None and not gate.limit.closed_for_s(now) and gate.rates.is_open(now):
                busy = (pool.name, gate)
        if busy is not None and busy[1].trickle.is_due(now):
            return Room(1, busy[0], is_trickle=True)
        return None

    def started(self, pool: str, now: float) -> None:
        if pool:
            self._gate(pool, now).trickle.started(now)

    def answered(self, pool: str, in_flight: int, headers: Sequence[tuple[bytes, bytes]], now: float) -> None:
        """A job was answered well; `in_flight` there, with it."""
        gate = self._gate(pool, now)
        gate.limit.succeeded(in_flight)
        gate.rates.read(readings(headers), now, self._settings().reserve)

    def refused(
        self, pool: str, retry_after_s: float | None, headers: Sequence[tuple[bytes, bytes]], now: float
    ) -> None:
        gate = self._gate(pool, now)
        gate.limit.refused(now, retry_after_s)
        gate.rates.read(readings(headers), now, self._settings().reserve)

    def limits(self) -> dict[str, float]:
        """By pool, how many jobs may run at most. For metrics."""
        return {pool: gate.limit.value for pool, gate in self._gates.items()}

    def _count(self, pool: Pool, gate: _Gate, load: Load, now: float) -> int:
        if not gate.rates.is_open(now):
            return 0
        reserve = self._settings().reserve
        if is_congested(pool.endpoints, now, reserve):
            gate.limit.crowded(now)
            return 0
        idle = idle_slots(pool.endpoints, now, reserve) - load.unsent.get(pool.name, 0)
        running = load.running.get(pool.name, 0)
        room = min(idle, gate.limit.room(running, now), job_slots(pool.endpoints, reserve) - running)
        slots = sum(endpoint.max_in_flight for endpoint in pool.endpoints) / self._processes
        ramped = gate.ramp.room(running, min(ceil(slots) or gate.limit.value, gate.limit.value), now)
        self.is_ramping = self.is_ramping or 0 <= ramped < room
        return min(room, ramped)

    def _gate(self, pool: str, now: float, *, is_bounded: bool = False) -> _Gate:
        gate = self._gates.get(pool)
        settings = self._settings()
        if gate is None:
            gate = self._gates[pool] = _Gate(
                AsyncLimit(settings.running, is_bounded=is_bounded),
                Trickle(settings.trickle_s * self._processes, now),
                Ramp(now),
            )
        gate.limit.ceiling = settings.running
        return gate


def readings(headers: Sequence[tuple[bytes, bytes]]) -> list[RateReading]:
    """What an answer's headers say of the account's rates, in OpenAI's names (`x-ratelimit-remaining-requests`) or Anthropic's
    (`anthropic-ratelimit-requests-remaining`)."""
    told: dict[tuple[bytes, bytes], bytes] = {}
    for name, value in headers:
        if name.startswith(_OPENAI):
            kind, _, measure = name.removeprefix(_OPENAI).partition(b"-")
            told[measure, kind] = value
        elif name.startswith(_ANTHROPIC):
            measure, _, kind = name.removeprefix(_ANTHROPIC).rpartition(b"-")
            told[measure, kind] = value
    found = []
    for measure in {measure for measure, _ in told}:
        limit, left = told.get((measure, b"limit"), b""), told.get((measure, b"remaining"), b"")
        if limit.isdigit() and left.isdigit() and int(limit) > 0:
            resets_in_s = span_s(told.get((measure, b"reset"), b"").decode("latin-1"))
            found.append(RateReading(int(limit), int(left), resets_in_s))
    return found


def span_s(text: str) -> float:
    """`120ms`, `8.64s`, `6m0s`, `1h2m3s`, or plain seconds; a second where it is anything else."""
    total, number, rest = 0.0, "", text.strip()
    while rest:
        if rest[0].isdigit() or rest[0] == ".":
            number, rest = number + rest[0], rest[1:]
            continue
        unit = "ms" if rest.startswith("ms") else rest[0]
        if unit not in _SPAN_UNITS_S or not number:
            return _UNKNOWN_RESET_S
        try:
            total += float(number) * _SPAN_UNITS_S[unit]
        except ValueError:
            return _UNKNOWN_RESET_S
        number, rest = "", rest[len(unit) :]
    if number:
        return float(number) if number.replace(".", "", 1).isdigit() else _UNKNOWN_RESET_S
    return total or _UNKNOWN_RESET_S
