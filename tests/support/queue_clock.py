"""A queue store's time, moved by the test."""

from gateway.stores.limit_sqlite import Clocks


class QueueClock:
    def __init__(self, time_s: float = 1_800_000_000.0) -> None:
        self.time_s = time_s

    def forward(self, seconds: float) -> None:
        self.time_s += seconds

    def now_us(self) -> int:
        return round(self.time_s * 1e6)

    @property
    def clocks(self) -> Clocks:
        return Clocks(self.now_us, self.now_us, "boot")
