"""What the configuration says of limits: who may use how much in which time, and who an end user is.

Owns how a limit is written, in the file and over the management API alike, and turns it into a `Limit`. Refuses to
know how limits are counted and where.
"""

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, cast, get_args
from zoneinfo import ZoneInfo

from msgspec.structs import replace
from pydantic import AfterValidator, Field, PlainSerializer, model_validator

from backends.config import EVERY as EVERY_NAME
from backends.config import HeaderName, Names
from gateway.config_checks import pattern
from local_engine.config import RESTART, Section
from policies.limits.limit import EVERY, SLOT_MEASURES, Level, Limit, Measure, Scope, Span, Window
from policies.limits.messages import WhenAway

# Beyond it a script in Redis would count wrongly: its numbers are doubles.
MAX_AMOUNT: Final = 2**53 - 1
MAX_SPAN_S: Final = 366 * 86_400
_NANO: Final = 1_000_000_000
_SPAN: Final = re.compile(r"(\d{1,8})([smhd])")
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_NAME: Final = re.compile(r"[A-Za-z0-9._@:+-]{1,64}")
# As written -> what is counted.
MEASURES: Final[dict[str, Measure]] = {
    "requests": "requests",
    "tokens": "tokens",
    "input_tokens": "input_tokens",
    "output_tokens": "output_tokens",
    "concurrent_requests": "concurrent_requests",
    "concurrent_streams": "concurrent_streams",
    "usd": "money",
}


def scope_of(text: str) -> Scope:
    """`team:research`, `key:*`. ValueError with a sentence."""
    level, colon, name = text.partition(":")
    if level not in get_args(Level) or not colon or not name.strip() or len(name) > 256:
        raise ValueError(
            f"a scope is written LEVEL:NAME or LEVEL:*, with a level of {', '.join(get_args(Level))}"
        )
    if "*" in name and name != EVERY:
        raise ValueError("a scope names one, or everybody with *")
    return Scope(cast("Level", level), name)


def scope_text(scope: Scope) -> str:
    return f"{scope.level}:{scope.name}"


def window_of(text: str, measure: Measure, zone: str) -> Window:
    """`60s`, `5h`, `30d`; `day`, `week`, `month` by the calendar; `ever`. ValueError with a sentence."""
    if text in ("day", "week", "month"):
        return Window(cast("Span", text), zone=zone)
    if text == "ever":
        return Window("total")
    found = _SPAN.fullmatch(text)
    length_s = int(found[1]) * _UNITS_S[found[2]] if found else 0
    if not 1 <= length_s <= MAX_SPAN_S:
        raise ValueError("per is a time such as 60s, 5h or 30d (a year at most), or day, week, month, ever")
    return Window("rate" if measure == "requests" else "rolling", length_s)


def _checked_scope(text: str) -> str:
    scope_of(text)
    return text


def _known_zone(zone: str) -> str:
    try:
        ZoneInfo(zone)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f'there is no time zone "{zone}"; write one such as Europe/Berlin') from error
    return zone


def _plain(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("a limit's name has letters, digits and . _ @ : + -, up to 64")
    return name


Patterns = Annotated[Names, AfterValidator(lambda names: names and tuple(map(pattern, names)))]
Count = Annotated[int, Field(ge=0, le=MAX_AMOUNT)]
Dollars = Annotated[
    Decimal,
    Field(ge=0, le=Decimal(9_000_000), decimal_places=9),
    PlainSerializer(str, return_type=str, when_used="json"),
]


class LimitConfig(Section):
    """One limit: whose, of what, how much, in which time. Exactly one of the amounts is given."""

    scope: Annotated[str, AfterValidator(_checked_scope)]
    """Whose: `org:`, `team:`, `key:`, `user:`, `model:` or `tag:` and a name; `*`: each of them, alone."""
    name: Annotated[str, AfterValidator(_plain)] | None = None
    """Shown to callers, and what a limit in the database replaces; null: made of measure and time, `requests-60s`."""
    requests: Count | None = None
    """Requests in a time."""
    tokens: Count | None = None
    """Tokens in a time, of prompts and answers."""
    input_tokens: Count | None = None
    """Tokens of prompts in a time."""
    output_tokens: Count | None = None
    """Tokens of answers in a time."""
    concurrent_requests: Count | None = None
    """Requests at any moment."""
    concurrent_streams: Count | None = None
    """Streamed requests at any moment."""
    usd: Dollars | None = None
    """Dollars in a time."""
    per: str | None = None
    """The time: `60s`, `10m`, `5h`, `30d` of any length; `day`, `week`, `month` by the calendar; `ever`."""
    zone: Annotated[str, AfterValidator(_known_zone)] = "UTC"
    """Whose calendar: the name of a time zone."""
    burst: Annotated[int, Field(ge=1, le=MAX_AMOUNT)] | None = None
    """Requests in a time only: how many may come at once; null: all of them."""
    cached_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Tokens only: how much a token counts that was read from a cache."""
    models: Patterns = Field(default=None, json_schema_extra=EVERY_NAME)
    """Models whose use counts: `*` or a list; a name may end in `*`."""
    soft: bool = False
    """Warn, do not refuse."""
    exact: bool = False
    """Nothing beyond the amount, at a trip to the store for every request."""
    when_away: WhenAway | None = None
    """While Redis is away: `local` (this worker's share), `open` (let through), `closed` (what was reserved before, then
    refuse); null: `closed` for dollars, `local` for all else."""

    @model_validator(mode="after")
    def _is_one_limit(self) -> "LimitConfig":
        given = [name for name in MEASURES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"needs exactly one of {', '.join(MEASURES)}")
        measure = MEASURES[given[0]]
        if (measure in SLOT_MEASURES) != (self.per is None):
            raise ValueError(
                f"{given[0]} counts at any moment: leave out per"
                if self.per
                else "needs per: 60s, 5h, day, month, ever"
            )
        if self.per is not None and window_of(self.per, measure, self.zone).span != "rate" and self.burst:
            raise ValueError("burst is for requests in a time such as 60s")
        if self.cached_weight != 1.0 and "tokens" not in measure:
            raise ValueError("cached_weight is for tokens")
        return self

    def limit(self) -> Limit:
        written = next(name for name in MEASURES if getattr(self, name) is not None)
        measure, amount = MEASURES[written], getattr(self, written)
        window = Window("now") if self.per is None else window_of(self.per, measure, self.zone)
        return Limit(
            name=self.name or _name_of(measure, window),
            scope=scope_of(self.scope),
            measure=measure,
            amount=int(amount * _NANO) if measure == "money" else amount,
            window=window,
            burst=self.burst or 0,
            cached_weight_percent=round(self.cached_weight * 100),
            is_exact=self.exact,
            warns_only=self.soft,
            when_away=self.when_away or ("closed" if measure == "money" else "local"),
            models=self.models,
        )


def _name_of(measure: Measure, window: Window) -> str:
    if window.span == "now":
        return measure.replace("_", "-")
    length = f"{window.length_s}s" if window.length_s else window.span
    return f"{measure.replace('_', '-')}-{length}"


class TeamConfig(Section):
    """A team: what holds for all of its keys. What the database says of a team of this name wins, setting by setting."""

    organisation: str = Field(default="", max_length=128)
    """The organisation it belongs to."""
    models: Patterns = Field(default=None, json_schema_extra=EVERY_NAME)
    """Models its keys may use, whatever a key's own list says: `*` or a list; a name may end in `*`."""
    blocked: bool = False
    """Whether its keys are refused."""


EndUserField = Literal["safety_identifier", "user", "metadata.user_id"]


class EndUsersConfig(Section):
    """Who is behind a request, where its key's holder is trusted to say so. Needed by limits of `user:`."""

    fields: tuple[EndUserField, ...] = ()
    """Where the request says it, first match wins; none: nobody is trusted."""
    header: HeaderName | None = None
    """A request header that says it, before the fields."""
    keys: Patterns = Field(default=None, json_schema_extra=EVERY_NAME)
    """Names of the keys that are trusted: `*` or a list; a name may end in `*`."""
    required: bool = False
    """Refuse requests of trusted keys that do not say it."""


class CallerLimitsConfig(Section):
    """What callers may use, over all workers and nodes together. A limit in the database wins over one of its scope and
    name here."""

    rules: tuple[LimitConfig, ...] = ()
    """The limits."""
    over_admission: float = Field(default=0.01, ge=0, le=0.5)
    """What all workers together may hold of a limit as slack, so that most requests ask no store: its part of the amount,
    and the worst by which a limit that is not `exact` is exceeded."""
    output_tokens: int = Field(default=1024, ge=1)
    """What a request that does not say `max_tokens` reserves for its answer."""
    lapse_s: float = Field(default=10.0, ge=2, json_schema_extra=RESTART)
    """After which what a killed worker had reserved is free again."""
    check_at: str = Field(default="03:30", pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")
    """When, each night (UTC), what is counted as spent is compared with the ledger."""
    end_users: EndUsersConfig = EndUsersConfig()

    @model_validator(mode="after")
    def _names_are_unique(self) -> "CallerLimitsConfig":
        seen: set[tuple[Any, str]] = set()
        for rule in self.rules:
            limit = rule.limit()
            if (limit.scope, limit.name) in seen:
                raise ValueError(f"two limits of {rule.scope} are called {limit.name}: give one a name")
            seen.add((limit.scope, limit.name))
        return self

    def declared(self, key_ids: Mapping[str, str]) -> tuple[Limit, ...]:
        """The rules as limits; a key of `key_ids` is meant by its name, any other by its id."""
        limits = (rule.limit() for rule in self.rules)
        return tuple(
            replace(limit, scope=Scope("key", key_ids[limit.scope.name]))
            if limit.scope.level == "key" and limit.scope.name in key_ids
            else limit
            for limit in limits
        )
