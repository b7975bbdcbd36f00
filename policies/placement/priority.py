"""The classes of requests when there is not room for all, and what each is given.

A class may keep a share of a pool's slots for itself and those above it: the others see a pool that is full earlier.
Waiting raises a request by one class per `ageing_s`, so that no class starves another.
"""

from typing import Final, Literal

from pydantic import Field

from local_engine.config import Section

Priority = Literal["system", "interactive", "default", "bulk"]
PRIORITIES: Final[tuple[Priority, ...]] = ("system", "interactive", "default", "bulk")  # the highest first
DEFAULT: Final = PRIORITIES.index("default")


class PriorityConfig(Section):
    """One class."""

    reserved: float = Field(default=0.0, ge=0, lt=1)
    """Share of each endpoint's slots that only this class and those above it may use."""
    waiting: int = Field(default=512, ge=0)
    """How many may wait in one worker for one pool; those above are refused."""
    wait_s: float = Field(default=60.0, ge=0)
    """How long one may wait before it falls back, is queued, or is refused."""
    ageing_s: float = Field(default=30.0, gt=0)
    """Having waited for so long, a request counts as of the next higher class."""


class PrioritiesConfig(Section):
    """What each class gets where every endpoint is full. A key's class is its `priority`."""

    system: PriorityConfig = PriorityConfig(waiting=64, wait_s=30.0, ageing_s=5.0)
    """Health checks and the like."""
    interactive: PriorityConfig = PriorityConfig(waiting=256, wait_s=30.0, ageing_s=5.0)
    """Somebody is watching."""
    default: PriorityConfig = PriorityConfig()
    """What keys are that say nothing else."""
    bulk: PriorityConfig = PriorityConfig(waiting=1024, wait_s=300.0, ageing_s=120.0)
    """Can wait."""

    def classes(self) -> tuple[PriorityConfig, ...]:
        """In the order of PRIORITIES."""
        return (self.system, self.interactive, self.default, self.bulk)


def ceilings(classes: tuple[PriorityConfig, ...]) -> tuple[float, ...]:
    """The saturation at which an endpoint is full, for each class."""
    ceiling, found = 1.0, []
    for priority in classes:
        found.append(max(ceiling, 0.0))
        ceiling -= priority.reserved
    return tuple(found)
