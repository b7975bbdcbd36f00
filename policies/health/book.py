"""The health of all endpoints of this process, pool by pool, and who of them may be chosen.

Owns what needs more than one endpoint to be seen: the panic rule, a slow one among quick ones, one that is silent
while others talk. Lives as long as the process: a new configuration finds what is known of an address it keeps.
Refuses to know who sends and probes.
"""

from collections.abc import Callable, Iterable, Sequence
from statistics import median_low
from typing import Final

from backends.load import EndpointLoad
from policies.health.endpoint import MIN_SAMPLES, EndpointHealth
from policies.health.settings import HealthSettings

# One silent request may just be a long prompt; so many at one endpoint are not.
_STALLED_REQUESTS: Final = 3
# Times the usual wait of the others.
_STALLED_FACTOR: Final = 10.0
# Steps through 0..1 without ever bunching: the golden ratio.
_STEP: Final = 0.6180339887498949


class HealthBook:
    """One per process. `on_change` hears of every change of state, after it happened."""

    def __init__(self, on_change: Callable[[EndpointHealth], None] = lambda _: None) -> None:
        self._tell = on_change
        self._pools: dict[str, list[EndpointHealth]] = {}
        self._of: dict[EndpointLoad, EndpointHealth] = {}
        # Those that are not simply up: empty nearly always, and then nothing here costs anything.
        self._ailing: dict[EndpointLoad, EndpointHealth] = {}
        self._draw = 0.0

    def declare(self, pools: Iterable[tuple[str, HealthSettings, Sequence[EndpointLoad]]]) -> None:
        """The pools from now on. What is known of an address stays, whatever else of its settings changed."""
        known = {
            (pool, health.endpoint.hash_key): health
            for pool, members in self._pools.items()
            for health in members
        }
        self._pools = {}
        for name, settings, endpoints in pools:
            members = self._pools[name] = []
            for endpoint in endpoints:
                health = known.get((name, endpoint.hash_key))
                if health is None:
                    health = EndpointHealth(endpoint, settings, self._changed)
                else:
                    endpoint.health = health.endpoint.health
                    health.endpoint, health.settings = endpoint, settings
                members.append(health)
        self._of = {health.endpoint: health for health in self.all()}
        self._ailing = {e: health for e, health in self._of.items() if _is_ailing(health)}

    def all(self) -> list[EndpointHealth]:
        return [health for members in self._pools.values() for health in members]

    def of(self, endpoint: EndpointLoad) -> EndpointHealth | None:
        """None: its pool has left the configuration."""
        return self._of.get(endpoint)

    def find(self, name: str) -> EndpointHealth | None:
        """By the endpoint's name; for words from other processes."""
        return next((health for health in self._of.values() if health.endpoint.name == name), None)

    def usable(
        self, endpoints: Sequence[EndpointLoad], now: float, session: int = 0
    ) -> Sequence[EndpointLoad]:
        """Those that may be chosen now; never empty if `endpoints` is not.

        One that warms up takes part in a growing share of the choices, and a session that has come home stays. When
        more than half would be left out for their health all are used: the few that are left would drown, and what
        looks like a fault of so many may be one of ours.
        """
        if not self._ailing:
            return endpoints
        self._draw = (self._draw + _STEP) % 1.0
        draw = (session & 0xFFFF) / 0x10000 if session else self._draw
        well: list[EndpointLoad] = []
        out = 0
        for endpoint in endpoints:
            health = self._ailing.get(endpoint)
            if health is None or _may_take(health, now, draw):
                well.append(endpoint)
            elif health.state == "out":
                out += 1
        if 2 * out > len(endpoints):
            well = list(endpoints)
        rested = [endpoint for endpoint in well if not self._is_cooling(endpoint, now)]
        return rested or well or endpoints

    def is_down(self, endpoints: Sequence[EndpointLoad], now: float) -> bool:
        """Whether none of these is believed to answer: another target, if there is one, should be asked first."""
        return bool(self._ailing) and all(
            health is not None and (now < health.cool_until_at or not _may_take(health, now, 0.0))
            for health in map(self._ailing.get, endpoints)
        )

    def may_retry_at(self, endpoint: EndpointLoad, now: float) -> bool:
        """Whether a second attempt makes sense there: a first one is made in a panic even where it hardly does."""
        return endpoint.health > 0.0 and not self._is_cooling(endpoint, now)

    def check(self, now: float) -> None:
        """What shows only over time and beside others; a few times a second."""
        for health in list(self._ailing.values()):
            health.refresh(now)
        for members in self._pools.values():
            if len(members) > 1:
                for health in members:
                    _compare(health, [other for other in members if other is not health], now)

    def _is_cooling(self, endpoint: EndpointLoad, now: float) -> bool:
        health = self._ailing.get(endpoint)
        return health is not None and now < health.cool_until_at

    def _changed(self, health: EndpointHealth) -> None:
        endpoint = health.endpoint
        if _is_ailing(health):
            self._ailing[endpoint] = health
        else:
            self._ailing.pop(endpoint, None)
        self._tell(health)


def _may_take(health: EndpointHealth, now: float, draw: float) -> bool:
    if health.state == "out":
        return health.may_try(now)
    health.refresh(now)
    return draw < health.endpoint.health


def _is_ailing(health: EndpointHealth) -> bool:
    return health.state != "up" or health.cool_until_at > 0.0


def _compare(health: EndpointHealth, others: list[EndpointHealth], now: float) -> None:
    settings = health.settings
    measured = [other for other in others if other.samples >= MIN_SAMPLES and other.state != "out"]
    if not measured:
        health.slow_pace = 0.0
        return
    health.slow_pace = settings.slow_factor * median_low(other.pace for other in measured)
    if health.state == "out" or health.waiting < _STALLED_REQUESTS or not settings.stall_s:
        return
    usual_s = median_low(other.first_byte_s for other in measured)
    silent_s = now - health.silent_since_at
    # Others must have been heard since, or it is the way to all of them that is silent.
    if silent_s > max(settings.stall_s, _STALLED_FACTOR * usual_s) and any(
        other.silent_since_at > health.silent_since_at + settings.stall_s / 2 for other in measured
    ):
        health.eject(now, "stalled")
