"""What a limit is: whose, of what, how much, in which time.

Owns the vocabulary the configuration, the management API and the denials share. Refuses to know stores and
callers' requests. A Limit is immutable; changing one means making another with the same `name` and scope,
which counts on where the first stood.
"""

import hashlib
import re
from typing import Final, Literal

import msgspec

from policies.limits.messages import FOREVER_US, Counter, Kind, WhenAway
from policies.limits.periods import Calendar, edges

Level = Literal["org", "team", "key", "user", "model", "tag"]
Measure = Literal[
    "requests",
    "tokens",  # input and output
    "input_tokens",
    "output_tokens",
    "concurrent_requests",
    "concurrent_streams",
    "money",  # nano-dollars
]
Span = Literal["rate", "rolling", "day", "week", "month", "total", "now"]

SLOT_MEASURES: Final = frozenset({"concurrent_requests", "concurrent_streams"})
EVERY: Final = "*"
_SLICES: Final = 60  # a rolling window forgets in steps of a 60th
_PLAIN: Final = re.compile(r"[A-Za-z0-9._@:+-]{1,64}")


class Scope(msgspec.Struct, frozen=True):
    """Whose limit: a level and the name there. `*` is everybody of the level, each counted alone.

    Names: an organisation's, a team's, a key's id, an end user's id (within the organisation, team or key that
    trusts it), a public model's name, a tag.
    """

    level: Level
    name: str = EVERY

    def __str__(self) -> str:
        return f"{self.level} {self.name}"


class Window(msgspec.Struct, frozen=True):
    """The time a limit's amount is for.

    `rate`: refills evenly, `amount` in `length_s` (GCRA); for requests. `rolling`: any `length_s` seconds. `day`,
    `week` (from Monday), `month`: by the calendar of `zone`. `total`: for ever. `now`: at any one moment, for slots.
    """

    span: Span
    length_s: int = 0
    zone: str = "UTC"


class Limit(msgspec.Struct, frozen=True):
    """One limit. `name` is unique within its scope, stable, and shown to callers: `requests-60s`, `money-month`."""

    name: str
    scope: Scope
    measure: Measure
    amount: int  # requests, tokens, slots or nano-dollars; 0: nothing is allowed
    window: Window
    burst: int = 0  # rate only: most at once; 0: `amount`
    cached_weight_percent: int = 100  # tokens only: how much a token read from a cache counts
    is_exact: bool = False  # every request asks the store: no slice is ever held
    warns_only: bool = False  # soft: counted and alerted, never refused
    when_away: WhenAway = "local"
    models: tuple[str, ...] | None = None  # counts these public models only (may end in `*`); None: every one

    def counter(self, member: str, now_us: int) -> "Counter":
        """The counter of one member of the scope (`scope.name`, or who it is under `*`), as of this moment."""
        kind, periods, window_us = self._shape(now_us)
        return Counter(
            key=counter_key(self.scope.level, member, self.name),
            kind=kind,
            amount=self.amount,
            window_us=window_us,
            slice_us=max(1, window_us // _SLICES) if kind == "rolling" else 0,
            burst=(self.burst or self.amount) if kind == "rate" else 0,
            periods=periods,
            when_away=self.when_away,
        )

    def _shape(self, now_us: int) -> tuple[Kind, tuple[int, int, int], int]:
        window = self.window
        match window.span:
            case "now":
                return "slots", (0, 0, 0), 0
            case "rate" | "rolling":
                return window.span, (0, 0, 0), window.length_s * 1_000_000
            case "total":
                return "period", (0, FOREVER_US, FOREVER_US), 0
            case _:
                return "period", edges(Calendar(window.span, window.zone), now_us), 0


def counter_key(level: Level, member: str, name: str) -> str:
    """`team/research/money-month`. Names that are long or odd (an end user's may be anything) become a hash."""
    if not _PLAIN.fullmatch(member):
        member = "#" + hashlib.blake2b(member.encode(), digest_size=16).hexdigest()
    return f"{level}/{member}/{name}"
