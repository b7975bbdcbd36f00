"""When an endpoint is taken out and how it comes back: the figures of one pool.

Refuses to know what a probe sends and how: only whether there is one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthSettings:
    """`failures` in a row take an endpoint out (0: nothing ever does, nor does it rest); a connection that cannot be made does at once.

    It stays out for `eject_s`, twice as long each time up to `eject_max_s`, then is tried, and gets its share back
    over `slow_start_s`. Answers at `slow_factor` times the pace of the pool's others count as failures (0: never).
    An endpoint is stalled when requests wait and it has said nothing for `stall_s` and for ten times what the
    others take (0: never). With `has_probe`, probes are the trial while somebody tells of them. Retries are at most
    `retry_share` of the requests, but always `retry_floor` (`policies.retry`).
    """

    failures: int = 3
    eject_s: float = 10.0
    eject_max_s: float = 300.0
    slow_start_s: float = 10.0
    slow_factor: float = 5.0
    stall_s: float = 1.0
    has_probe: bool = False
    retry_share: float = 0.2
    retry_floor: int = 3
