"""A price as the operator writes it: dollars per million tokens, or LiteLLM's names in dollars per token.

Numbers are kept as they are written, never through binary floats. A price in the configuration is the whole
price: nothing of the public list shines through.
"""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

from policies.rate_card import ANY_PROMPT, STANDARD, Period, RateCard, Step, Steps, compile_steps, nanousd

_MILLION: Final = 1_000_000
_LARGEST_FACTOR: Final = 100
_TIERS: Final = ("batch", "flex", "priority", "fast")
_SYNONYMS: Final = {"cache_read": "cached_input", "cache_read_audio": "cached_input_audio"}
# Field -> the card's bucket, where the names differ.
_BUCKETS: Final = {
    "cached_input": "cache_read",
    "cached_input_audio": "cache_read_audio",
    "per_request": "request",
}

_LITELLM: Final = {
    "input_cost_per_token": "input",
    "cache_read_input_token_cost": "cached_input",
    "cache_creation_input_token_cost": "cache_write",
    "cache_creation_input_token_cost_above_1hr": "cache_write_1h",
    "output_cost_per_token": "output",
    "output_cost_per_reasoning_token": "reasoning",
    "input_cost_per_audio_token": "input_audio",
    "cache_read_input_audio_token_cost": "cached_input_audio",
    "output_cost_per_audio_token": "output_audio",
    "input_cost_per_request": "per_request",
}
_LITELLM_SUFFIX: Final = re.compile(r"_above_(\d+)k_tokens|_(batches|flex|priority)")
_LITELLM_NAME: Final = rf"^(?:{'|'.join(_LITELLM)})(?:_above_\d+k_tokens|_batches|_flex|_priority)*$"
_IS_LITELLM: Final = re.compile(_LITELLM_NAME)


def _exact(value: object) -> Decimal:
    """As written: a float's shortest text is what the file said."""
    try:
        number = Decimal(repr(value) if isinstance(value, float) else str(value).strip())
    except InvalidOperation:
        raise ValueError("is not a number, like 2.50") from None
    if not number.is_finite() or number < 0:
        raise ValueError("is not a number of zero or more")
    return number


def _price(value: object) -> Decimal:
    dollars = _exact(value)
    if dollars > _MILLION:
        raise ValueError("is more than $1 a token; prices are in US dollars per million tokens")
    if dollars and not nanousd(dollars):
        raise ValueError(
            "is under a nano-dollar per million tokens; prices are in US dollars per million tokens"
        )
    return dollars


def _factor(value: object) -> Decimal:
    factor = _exact(value)
    if factor > _LARGEST_FACTOR:
        raise ValueError("is a factor on the standard prices, like 0.5")
    return factor


_NUMBER_SCHEMA: Final = WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0}, {"type": "string"}]})
Usd = Annotated[Decimal, BeforeValidator(_price), _NUMBER_SCHEMA]
Factor = Annotated[Decimal, BeforeValidator(_factor), _NUMBER_SCHEMA]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Rates(_Section):
    """Prices by kind of token. What is not given costs what it is a kind of."""

    input: Usd | None = None
    """US dollars per million prompt tokens."""
    cached_input: Usd | None = None
    """Prompt tokens read from the provider's cache; `input` if not given."""
    cache_write: Usd | None = None
    """Prompt tokens written to the cache; `input` if not given."""
    cache_write_1h: Usd | None = None
    """Written for an hour; `cache_write` if not given."""
    output: Usd | None = None
    """Without it, an answer with output tokens has no known cost (an embedding has none)."""
    reasoning: Usd | None = None
    """Output the model thinks with; `output` if not given."""
    input_audio: Usd | None = None
    """Prompt tokens of sound; `input` if not given."""
    cached_input_audio: Usd | None = None
    """Those read from the cache; `cached_input` if not given, without that `input_audio`."""
    output_audio: Usd | None = None
    """Output tokens of sound; `output` if not given."""
    per_request: Usd | None = None
    """US dollars per request, on top of its tokens."""


class PromptTier(_Rates):
    """Prices of a long prompt; they hold for all tokens of the request."""

    above: int = Field(ge=0)
    """For prompts of more tokens than this, cached ones included."""


def _each_once(tiers: tuple[PromptTier, ...]) -> tuple[PromptTier, ...]:
    if len({tier.above for tier in tiers}) < len(tiers):
        raise ValueError("two of these have the same `above`")
    return tiers


PromptTiers = Annotated[tuple[PromptTier, ...], AfterValidator(_each_once)]


class ServiceTier(_Rates):
    """Prices where the upstream answers with this service tier: a factor on the standard ones, or prices, or both."""

    factor: Factor = Decimal(1)
    """On the standard prices; what is given beside it replaces them."""
    tiers: PromptTiers = ()

    @model_validator(mode="before")
    @classmethod
    def _is_factor(cls, value: object) -> object:
        return value if isinstance(value, (Mapping, cls)) else {"factor": value}


class PriceConfig(_Rates):
    """What a model costs, in US dollars per million tokens. LiteLLM's names (dollars per token) are accepted too."""

    model_config = ConfigDict(
        json_schema_extra={"patternProperties": {_LITELLM_NAME: {"type": ["number", "string", "null"]}}}
    )

    tiers: PromptTiers = ()
    """Other prices for long prompts."""
    batch: ServiceTier | None = None
    flex: ServiceTier | None = None
    priority: ServiceTier | None = None
    fast: ServiceTier | None = None
    free: bool = False
    """Costs nothing, on purpose."""

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, value: object) -> object:
        return _native(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _is_whole(self) -> "PriceConfig":
        if self.free:
            if len(self.model_fields_set) > 1:
                raise ValueError("a free model has no prices: remove them, or `free`")
        elif self.input is None:
            raise ValueError("needs `input`, in US dollars per million tokens (or `free: true`)")
        return self

    def card(self) -> RateCard:
        """These prices at any time."""
        standard = _ladders(self, {})
        cards: dict[str, Steps | None] = {STANDARD: compile_steps(standard)}
        for name in _TIERS:
            tier: ServiceTier | None = getattr(self, name)
            if tier is not None:
                scaled = {
                    bucket: [(above, dollars * tier.factor) for above, dollars in ladder]
                    for bucket, ladder in standard.items()
                }
                cards[name] = compile_steps(_ladders(tier, scaled))
        return RateCard([Period(0.0, 0.0, cards)])


def _ladders(prices: PriceConfig | ServiceTier, inherited: Mapping[str, list[Step]]) -> dict[str, list[Step]]:
    """Own prices replace inherited ones, kind by kind and step by step."""
    ladders = {bucket: list(ladder) for bucket, ladder in inherited.items()}
    for field in _Rates.model_fields:
        bucket = _BUCKETS.get(field, field)
        scale = _MILLION if field == "per_request" else 1
        own: Decimal | None = getattr(prices, field)
        if own is not None:
            ladders[bucket] = [(ANY_PROMPT, own * scale)]
        for tier in prices.tiers:
            dollars: Decimal | None = getattr(tier, field)
            if dollars is not None:
                below = [step for step in ladders.get(bucket, []) if step[0] != tier.above]
                ladders[bucket] = [*below, (tier.above, dollars * scale)]
    return ladders


def _native(given: Mapping[Any, Any]) -> dict[Any, Any]:
    """Synonyms and LiteLLM's names in ours. A name that is neither stays, to be refused by the model."""
    native: dict[Any, Any] = {}
    translated: dict[str, dict[str, Any]] = {STANDARD: {}}
    for name, value in given.items():
        if not (isinstance(name, str) and _IS_LITELLM.match(name)):
            _put(native, _SYNONYMS.get(name, name), value, name)
        elif value is not None:
            field, service_tier, above = _parse_litellm(name)
            try:
                dollars = _exact(value) * (1 if field == "per_request" else _MILLION)
            except ValueError as error:
                raise ValueError(f"`{name}` {error}") from None
            section = translated.setdefault(service_tier, {})
            if above is None:
                _put(section, field, dollars, name)
            else:
                section.setdefault("tiers", {}).setdefault(above, {"above": above})[field] = dollars
    for service_tier, section in translated.items():
        if "tiers" in section:
            section["tiers"] = [tier for _, tier in sorted(section["tiers"].items())]
        for field, value in section.items() if service_tier == STANDARD else [(service_tier, section)]:
            _put(native, field, value, "LiteLLM's names")
    return native


def _put(place: dict[Any, Any], field: Any, value: Any, name: Any) -> None:
    if field in place:
        raise ValueError(f"`{name}` and `{field}` say the same thing twice; keep one of them")
    place[field] = value


def _parse_litellm(name: str) -> tuple[str, str, int | None]:
    """Field, service tier ("" if standard) and prompt size of a name of LiteLLM's."""
    service_tier, above = STANDARD, None
    for thousands, tier in _LITELLM_SUFFIX.findall(name):
        if thousands:
            above = int(thousands) * 1_000
        else:
            service_tier = tier.removesuffix("es")
    return _LITELLM[_LITELLM_SUFFIX.sub("", name)], service_tier, above
