"""What the configuration may say about where requests go: rules, fallbacks, shadows.

Each section is checked by itself here; names across sections, order and cycles in `gateway.routing_checks`.
"""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import AfterValidator, Field, model_validator

from backends.config import EVERY, Names
from gateway.config_checks import pattern
from local_engine.config import Section
from policies.placement.priority import Priority
from policies.rules.condition import Condition
from policies.rules.fallback import FailureClass
from policies.rules.params import FIXED, TOKEN_LIMITS, Params

OnFullName = Literal["wait", "fallback", "queue", "reject"]
ModelName = Annotated[str, Field(min_length=1, max_length=256)]


def _condition(text: str) -> str:
    if Condition(text).is_constant:
        raise ValueError("looks at nothing of the request; a rule that always matches has no `when`")
    return text


def _changeable(names: dict[str, Any]) -> dict[str, Any]:
    for name in FIXED.intersection(names):
        raise ValueError(f"{name} is not a rule's to change")
    return names


def _settable(fields: dict[str, Any]) -> dict[str, Any]:
    for name, value in fields.items():
        if not _is_json(value):
            raise ValueError(f"{name} has a value that JSON has not")
    return _changeable(fields)


def _is_json(value: Any) -> bool:
    """Neither a day nor infinite, nor beyond 64 bits."""
    try:
        return bool(msgspec.json.decode(msgspec.json.encode(value)) == value)
    except (OverflowError, TypeError, ValueError, RecursionError):
        return False


def _droppable(names: tuple[str, ...]) -> tuple[str, ...]:
    _changeable(dict.fromkeys(names))
    return names


When = Annotated[str, AfterValidator(_condition)]
Patterns = Annotated[Names, AfterValidator(lambda names: names and tuple(map(pattern, names)))]


class RuleParamsConfig(Section):
    """What a rule changes in the request's body, field by field, where the dialect has such a field."""

    set: Annotated[dict[str, Any], AfterValidator(_settable)] = Field(default_factory=dict)
    """Fields and the values they get, whatever the request says."""
    cap: Annotated[
        dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]],
        AfterValidator(_changeable),
    ] = Field(default_factory=dict)
    """Numbers that are lowered to this if they are larger. `max_tokens` is every dialect's limit of the answer, and is
    set if there is none."""
    drop: Annotated[tuple[str, ...], AfterValidator(_droppable)] = ()
    """Fields that are left out."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "RuleParamsConfig":
        limits = [name for name in TOKEN_LIMITS if name in self.cap]
        if len(limits) > 1:
            raise ValueError(f"cap: {' and '.join(limits)} are names of the same limit; give one")
        for first, second in ((self.set, self.cap), (self.set, self.drop), (self.cap, self.drop)):
            for name in sorted(set(first) & set(second)):
                raise ValueError(f"{name} is named twice: it can be set, capped or dropped")
        return self

    def resolve(self) -> Params | None:
        if not (self.set or self.cap or self.drop):
            return None
        caps = {name: int(cap) if cap == int(cap) else cap for name, cap in self.cap.items()}
        return Params(self.set, caps, frozenset(self.drop))


class RuleConfig(Section):
    """A rule of where requests go. Rules for the caller's key are tried first, then its team's, then everyone's; each
    list in the order of the file; the first that matches is followed. The last of all is the default, without any
    condition."""

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    """For `headgate explain` and the metrics; unique."""
    keys: tuple[str, ...] = ()
    """Names of the caller keys it is for."""
    teams: tuple[str, ...] = ()
    """Teams it is for. Neither keys nor teams: everyone."""
    models: Patterns = Field(default=None, json_schema_extra=EVERY)
    """Models it is for, as callers name them: `*` or a list; a name may end in `*`."""
    when: When | None = None
    """A condition in CEL over the request (docs/routing.md lists what it may read); null: always."""
    model: ModelName | None = None
    """The model that serves the request; null: the one asked for. Callers whose keys may not use it are passed over."""
    target: str = ""
    """One of that model's targets, `{provider or pool}` or `{provider or pool}/{model}`; empty: all, as the model has
    them."""
    params: RuleParamsConfig = RuleParamsConfig()
    """What is changed in the body."""
    on_full: OnFullName | None = None
    """What happens when every endpoint is full, unless the client says it."""
    priority: Priority | None = None
    """The class of its requests when there is not room for all, instead of the key's; a client may still ask for a
    lower one."""
    tags: tuple[str, ...] = ()
    """Added to the request's tags in the ledger."""
    grants: bool = False
    """Whether `model` is given also to callers whose keys may not use it."""


class FallbackConfig(Section):
    """A model that answers in place of one that cannot. Its own fallbacks follow it."""

    model: ModelName
    """A name under `models`, an alias, or `{provider}/{model}`."""
    failures: tuple[FailureClass, ...] = Field(
        default=("error", "timeout", "rate_limit", "overload"), min_length=1
    )
    """Failures it is for: `error`, `timeout`, `rate_limit`, `overload`, `context` (the prompt does not fit), `budget`
    (the caller's is used up)."""
    grants: bool = False
    """Whether it is given also to callers whose keys may not use it."""


class ShadowConfig(Section):
    """Copies of requests to another model, to try it with real work. Their answers are dropped, and no caller pays."""

    model: ModelName
    """A name under `models`, an alias, or `{provider}/{model}`."""
    percent: float = Field(default=100.0, gt=0, le=100)
    """Of the model's requests."""
    max_in_flight: int = Field(default=4, ge=1, le=1000)
    """Copies under way at once in each worker; what is above is not copied."""
