"""What is known of one endpoint's load and health, right now and in this process.

Counted figures are exact and immediate; scraped ones are the engine's own and hold until `fresh_until`, after
which nobody may act on them. Owns the numbers, not what is concluded from them: that is `policies.placement`.
No clock, no I/O: a simulation makes these as the gateway does.
"""

from typing import Final

# The share of one that is out and may be chosen all the same: for a trial, or because all are out.
LEAST_HEALTH: Final = 0.01
# Of a process's part of the slots: what it may send more than the others between two scrapes by mere chance.
_UNEVEN: Final = 0.25


class EndpointLoad:
    """One endpoint as a placement policy sees it.

    `name` is opaque to clients (`demo/0`); `hash_key` is what sessions are hashed with, the same in every process.
    """

    __slots__ = (
        "fresh_until",
        "hash_key",
        "health",
        "in_flight",
        "in_flight_at_scrape",
        "is_draining",
        "kv_usage",
        "max_in_flight",
        "max_waiting",
        "name",
        "place",
        "processes",
        "running",
        "scraped_at",
        "uncached_tokens",
        "waiting",
        "weight",
    )

    def __init__(
        self,
        name: str,
        hash_key: bytes,
        *,
        weight: float = 1.0,
        max_in_flight: int = 0,
        max_waiting: int = 0,
        processes: int = 1,
    ) -> None:
        self.name = name
        self.hash_key = hash_key
        self.weight = weight  # share of sessions and load, relative to the other endpoints of the pool
        self.max_in_flight = max_in_flight  # of all processes together; 0: no limit known
        self.max_waiting = (
            max_waiting  # in the engine's own queue at which it counts as full; 0: not looked at
        )
        self.processes = processes  # gateway processes that send here, each counting only its own
        self.place = (
            0  # which of them this is, from 0: of what they share out, the first ones take the odd ones
        )
        # Counted by this process, before dispatch, through `policies.placement.hold`.
        self.in_flight = 0
        self.uncached_tokens = 0  # of prompts whose first token is not there yet
        # Scraped: of the engine itself, whoever sent the requests.
        self.running = 0
        self.waiting = 0
        self.kv_usage = 0.0  # 0..1
        self.scraped_at = 0.0  # 0: never
        self.in_flight_at_scrape = 0  # of `in_flight`, when the figures came in
        self.fresh_until = 0.0
        # Written by health checking: 1 whole, between 0 and 1 warming up, 0 out.
        self.health = 1.0
        self.is_draining = False  # by the operator's word: finishes what it has

    def part_of(self, slots: int) -> int:
        """This process's share of so many. All shares together are exactly that."""
        return slots // self.processes + (self.place % self.processes < slots % self.processes)

    @property
    def is_limited(self) -> bool:
        """Whether it can ever be full."""
        return self.max_in_flight > 0 or self.scraped_at > 0.0

    def requests(self, now: float) -> int:
        """In flight at the endpoint, from all processes: what it says itself, and what we sent and got back since.

        The other processes have as many as we where nobody has told. Where the engine has, that guess would be wrong by as
        much as their shares differ, and near the limit it would find an endpoint full that is not. A burst reaches
        all of them alike, though: what goes beyond `_UNEVEN` of our part since the scrape, the others have sent, too.
        """
        if now >= self.fresh_until:
            return self.in_flight * self.processes
        since = self.in_flight - self.in_flight_at_scrape
        by_chance = _UNEVEN * self.max_in_flight / self.processes
        if self.processes > 1 and since > by_chance:
            since += int((self.processes - 1) * (since - by_chance))
        return max(self.in_flight, self.running + self.waiting + since)
