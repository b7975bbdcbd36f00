"""What the operator says about looking after engines: how they are watched, restarted, replaced and counted.

Owns the settings of the supervisor and of scaling. Refuses to know what an engine is.
"""

import re
from datetime import time
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, model_validator

from local_engine.config import RESTART, Section

Weekday = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
WEEKDAYS: Final[tuple[Weekday, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_CLOCK: Final = re.compile(r"([01]\d|2[0-3]):[0-5]\d")


def _clock(value: str) -> str:
    if not _CLOCK.fullmatch(value):
        raise ValueError("must be a time of day as 07:30")
    return value


TimeOfDay = Annotated[str, AfterValidator(_clock)]


class EnginesConfig(Section):
    """Engines that Headgate runs, of all pools together."""

    starts_at_once: int = Field(default=4, ge=1, le=256, json_schema_extra=RESTART)
    """Engines that may be starting side by side; others wait for their turn."""
    log_bytes: int = Field(default=16 << 20, ge=4096, json_schema_extra=RESTART)
    """Size at which an engine's log is rotated. Logs are in `engines/logs` of the storage directory."""
    log_keep: int = Field(default=4, ge=1, le=100, json_schema_extra=RESTART)
    """Older logs kept of each engine; every start begins a new one."""
    orphan_grace_s: float = Field(default=60.0, ge=1, json_schema_extra=RESTART)
    """When Headgate was killed, its engines wait so long for it to come back and take them over; then they end."""


class SupervisionConfig(Section):
    """How one pool's engines are watched and restarted."""

    look_every_s: float = Field(default=5.0, gt=0)
    """Between two looks at an engine that is ready."""
    hang_timeout_s: float = Field(default=180.0, ge=0)
    """An engine that has requests and computes nothing for so long, or answers nothing, is restarted; 0: never."""
    backoff_s: float = Field(default=1.0, gt=0)
    """Before the first restart in a row, doubled each time."""
    backoff_max_s: float = Field(default=60.0, gt=0)
    """The longest of these waits."""
    crash_loop: int = Field(default=5, ge=1)
    """After so many failures in a row it stays down and says so, until it is told to try again. A failure that trying
    again cannot cure (a flag vLLM does not know, no weights) counts for half of them."""
    settled_s: float = Field(default=300.0, ge=0)
    """One that was ready for so long has its earlier failures forgiven."""
    surge: int = Field(default=0, ge=0, le=64)
    """Additional engines while a pool's are replaced, so that its capacity stays; they need GPUs of their own. A pool
    of one engine has none that serves meanwhile without it."""


class ScheduleConfig(Section):
    """A time of the week with bounds of its own."""

    days: tuple[Weekday, ...] = WEEKDAYS
    """On which days it begins."""
    start: TimeOfDay
    """When it begins, by the machine's clock."""
    end: TimeOfDay
    """When it ends; before `start`: on the day after."""
    min: int | None = Field(default=None, ge=0)
    """The fewest engines meanwhile."""
    max: int | None = Field(default=None, ge=0)
    """The most."""

    def span(self) -> tuple[int, int]:
        """Start and end as minutes of a day; the end is beyond 24 h where it is on the next day."""
        start, end = time.fromisoformat(self.start), time.fromisoformat(self.end)
        first, last = start.hour * 60 + start.minute, end.hour * 60 + end.minute
        return first, last if last > first else last + 24 * 60


class ScaleConfig(Section):
    """How many of a pool's engines run, between bounds, by what they have to do."""

    min: int = Field(default=1, ge=0)
    """The fewest; 0: none while nobody asks, and the first request wakes one."""
    max: int = Field(ge=1, le=256)
    """The most. GPUs for all of them are set aside."""
    waiting: int = Field(default=4, ge=1)
    """Another one when so many requests wait for each that is ready: here or in the engines' own queues."""
    saturation: float = Field(default=0.8, gt=0, le=1)
    """Another one when those that are ready are so full (of their limit of requests or KV memory)."""
    idle_saturation: float = Field(default=0.3, ge=0, lt=1)
    """One less when the others would be no fuller than this, and nobody waits."""
    up_after_s: float = Field(default=10.0, ge=0)
    """The reason for one more must hold for so long."""
    down_after_s: float = Field(default=300.0, ge=0)
    """The reason for one less must hold for so long."""
    zero_after_s: float = Field(default=900.0, ge=0)
    """Without any request for so long, the last one goes, too, where `min` is 0."""
    zero: Literal["sleep", "stop"] = "stop"
    """How the last one goes: `sleep` keeps the process and gives its GPU memory back (`sleep_mode`)."""
    schedule: tuple[ScheduleConfig, ...] = ()
    """Other bounds at times; the first that matches counts."""

    @model_validator(mode="after")
    def _is_a_range(self) -> "ScaleConfig":
        for what, low, high in [
            ("min", self.min, self.max),
            *((f"schedule[{n}]", s.min, s.max) for n, s in enumerate(self.schedule)),
        ]:
            least = self.min if low is None else low
            most = self.max if high is None else high
            if least > most or most > self.max:
                raise ValueError(f"{what}: {least} to {most} is not within 0 to max ({self.max})")
        if self.idle_saturation >= self.saturation:
            raise ValueError("idle_saturation: must be below saturation, or engines would come and go")
        return self
