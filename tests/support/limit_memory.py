"""The meaning of a store of limits as a store, with a clock of the test's own."""

from collections.abc import Sequence

from policies.limits.counting import Holder, State, apply, lapse, reading
from policies.limits.messages import Counter, Reading, Reply, Update

START_US = 1_800_000_000_000_000  # a Friday morning, UTC


class MemoryStore:
    def __init__(self) -> None:
        self.now_us = START_US + 1_000_000_000
        self.states: dict[str, State] = {}
        self.holders: dict[str, Holder] = {}

    def wait(self, seconds: float) -> None:
        self.now_us += round(seconds * 1e6)

    def apply(self, update: Update) -> Reply:
        return apply(update, self.states, self.holders, self.now_us)

    def look(self, counters: Sequence[Counter]) -> tuple[int, list[Reading]]:
        lapse(self.states, self.holders, self.now_us)
        states = [self.states.get(counter.key, State()) for counter in counters]
        return self.now_us, [
            reading(counter, state, self.now_us) for counter, state in zip(counters, states, strict=True)
        ]

    def close(self) -> None:
        for state in self.states.values():
            assert all(units >= 0 for units in state.held.values())
