"""The configuration: what `config.yaml` may say, checked whole, immutable once loaded.

Owns the root model and `load`. Reads the environment only through the mapping it is given. Loading either
returns a Config in which every reference resolves, or raises one ConfigError with every problem found. `to_json`
holds secrets, and is for the private pipe to a worker only.
"""

from collections.abc import Mapping
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainValidator,
    SecretStr,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from backends.config import (
    EVERY,
    BlankIsNone,
    DeadlinesConfig,
    HeaderName,
    OutboundConfig,
    PoolConfig,
    PoolSettings,
    ProviderConfig,
    providers_in,
)
from backends.local_path import LocalPath
from gateway.alerts import AlertsConfig
from gateway.config_checks import explain, reference_problems, upstream_name
from gateway.config_file import ConfigError, Document, read_document
from gateway.engine_checks import engine_problems
from gateway.idempotency import IdempotencyConfig
from gateway.keys import DeclaredKey, refusal_of
from gateway.limits_config import CallerLimitsConfig, Patterns, TeamConfig
from gateway.overflow.config import QueueConfig
from gateway.redis_config import RedisConfig
from gateway.routing_checks import routing_problems
from gateway.routing_config import FallbackConfig, RuleConfig, ShadowConfig
from gateway.tenants import Declared
from local_engine.config import RESTART, Secret, Section
from local_engine.supervision_config import EnginesConfig
from policies.placement.priority import PRIORITIES, PrioritiesConfig, Priority
from policies.prices import PriceConfig
from policies.rules.split import SplitBy

__all__ = ["DEFAULT_PATH", "Config", "ConfigError", "load", "load_storage"]

DEFAULT_PATH: Final = Path("config.yaml")
MIN_PEPPER_CHARACTERS: Final = 32
_DIRECTORY: Final = ".headgate"


def _workers(value: Any) -> int | str:
    if value == "auto":
        return "auto"
    return TypeAdapter(Annotated[int, Field(ge=1, le=1024)]).validate_python(value)


def _expiry(value: Any) -> Any:
    """A day ends a key at its first moment, UTC; a time without a zone is UTC."""
    if isinstance(value, date) and not isinstance(value, datetime):
        return datetime.combine(value, time(), UTC)
    return value


def _in_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value


def _acceptable(key: SecretStr) -> SecretStr:
    refusal = refusal_of(key.get_secret_value()) if key.get_secret_value() else None
    if refusal is not None:
        raise ValueError(f"this key {refusal}")
    return key


def _long_enough(pepper: SecretStr) -> SecretStr:
    if len(pepper.get_secret_value()) < MIN_PEPPER_CHARACTERS:
        raise ValueError(f"must have at least {MIN_PEPPER_CHARACTERS} random characters")
    return pepper


Workers = Annotated[
    int | str,
    PlainValidator(_workers),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1}]}),
]
Host = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9.:_-]+$")]
Port = Annotated[int, Field(ge=0, le=65535)]
DeclaredSecret = Annotated[Secret, AfterValidator(_acceptable)]
Pepper = Annotated[Secret, AfterValidator(_long_enough)]
Moment = Annotated[datetime, BeforeValidator(_expiry), AfterValidator(_in_utc)]


class LimitsConfig(Section):
    """What one request and one connection may take of the data plane."""

    target_bytes: int = Field(default=8192, ge=256, json_schema_extra=RESTART)
    """Length of the request target."""
    header_bytes: int = Field(default=32768, ge=1024, json_schema_extra=RESTART)
    """All headers together."""
    header_count: int = Field(default=100, ge=8, json_schema_extra=RESTART)
    """Number of headers."""
    header_s: float = Field(default=20.0, gt=0, json_schema_extra=RESTART)
    """From the first byte of a request to the end of its headers."""
    idle_s: float = Field(default=75.0, gt=0, json_schema_extra=RESTART)
    """A kept connection without a request. Longer than the load balancer's, if there is one."""
    body_bytes: int = Field(default=33_554_432, ge=1024, json_schema_extra=RESTART)
    """A request body, compressed or expanded."""
    body_s: float = Field(default=30.0, gt=0, json_schema_extra=RESTART)
    """A whole body, plus one second for each 64 KiB received."""
    write_stall_s: float = Field(default=60.0, gt=0, json_schema_extra=RESTART)
    """A client that does not read."""
    connections: int = Field(default=0, ge=0, json_schema_extra=RESTART)
    """Open connections in each worker; 0: 40 % of the process's descriptor limit."""
    pipelined_bytes: int = Field(default=65536, ge=1024, json_schema_extra=RESTART)
    """Read ahead of a request that is still being answered."""
    response_bytes: int = Field(default=67_108_864, ge=1024)
    """An upstream's unstreamed answer."""


class ServerConfig(Section):
    """The data plane: where callers connect."""

    host: Host = Field(default="127.0.0.1", json_schema_extra=RESTART)
    """Address to listen on; `0.0.0.0` for all."""
    port: Port = Field(default=8080, json_schema_extra=RESTART)
    """0: any free one."""
    workers: Workers = Field(default="auto", json_schema_extra=RESTART)
    """Processes; `auto`: one for each CPU this process may use."""
    pre_stop_s: float = Field(default=0.0, ge=0)
    """After SIGTERM `/readyz` says no at once; requests are still taken for so long, until load balancers know."""
    drain_timeout_s: float = Field(default=120.0, ge=0)
    """How long open requests may take after SIGTERM."""
    hang_timeout_s: float = Field(default=30.0, ge=5, json_schema_extra=RESTART)
    """A worker that has not been heard of for so long is killed and replaced."""
    limits: LimitsConfig = LimitsConfig()


class OperatorKeyConfig(Section):
    """An operator key: for the management plane only."""

    name: str = Field(min_length=1, max_length=128)
    """Who it is for; unique among all keys declared."""
    key: DeclaredSecret
    """The key itself, from the environment. Empty: the entry is off."""
    expires: Moment | None = None
    """Day (its first moment, UTC) or time from which it is refused; null: never."""

    def declared(self) -> DeclaredKey:
        expires_time = None if self.expires is None else self.expires.timestamp()
        return DeclaredKey(self.name, self.key.get_secret_value(), "operator", expires_time=expires_time)


class KeyConfig(Section):
    """A caller key declared here. Others are made with `headgate keys create`."""

    name: str = Field(min_length=1, max_length=128)
    """Who it is for; unique among all keys declared."""
    key: DeclaredSecret
    """The key itself, from the environment. Empty: the entry is off."""
    team: str = Field(default="", max_length=128)
    """For reports and limits."""
    models: Patterns = Field(default=None, json_schema_extra=EVERY)
    """Models it may use: `*` or a list; a name may end in `*`."""
    expires: Moment | None = None
    """Day (its first moment, UTC) or time from which it is refused; null: never."""
    tags: tuple[str, ...] = ()
    """Written to the ledger with each of its requests."""
    priority: Priority = "default"
    """Its class when there is not room for all: a name under `overload`. A request may ask for a lower one."""

    def declared(self) -> DeclaredKey:
        return DeclaredKey(
            name=self.name,
            value=self.key.get_secret_value(),
            team=self.team,
            models=None if self.models is None else frozenset(self.models),
            expires_time=None if self.expires is None else self.expires.timestamp(),
            tags=self.tags,
            priority=PRIORITIES.index(self.priority),
        )


class ManagementConfig(Section):
    """The management plane: metrics and, with an operator key, keys, costs and reload."""

    host: Host = Field(default="127.0.0.1", json_schema_extra=RESTART)
    """Address to listen on. Not for the open network."""
    port: Port = Field(default=8081, json_schema_extra=RESTART)
    """0: any free one."""
    open_metrics: bool = False
    """Whether `/metrics` is given without a key."""
    keys: tuple[OperatorKeyConfig, ...] = ()
    """Operator keys declared here. Without any, the first start makes one and prints it."""


class StorageConfig(Section):
    """The embedded database."""

    directory: LocalPath = Field(default=Path(_DIRECTORY), json_schema_extra=RESTART)
    """Where it is; a relative path counts from this file's directory."""
    pepper: Annotated[Pepper | None, BlankIsNone] = Field(default=None, json_schema_extra=RESTART)
    """What keys are hashed with, at least 32 random characters, from the environment. Null: a file in the directory,
    made at the first start; without the same pepper, no stored key is valid."""
    synchronous: Literal["normal", "full"] = Field(default="normal", json_schema_extra=RESTART)
    """`normal`: a power cut may lose the last rows, a killed process none. `full`: neither, at a sync per commit."""
    redis: RedisConfig | None = Field(default=None, json_schema_extra=RESTART)
    """For several nodes; null: this machine alone."""


class JsonlConfig(Section):
    """The cost log: a copy of every ledger row as a line of JSON."""

    path: LocalPath = Field(json_schema_extra=RESTART)
    """The file; each worker appends its number. A relative path counts from this file's directory."""
    rotate_bytes: int = Field(default=104_857_600, ge=4096, json_schema_extra=RESTART)
    """Size at which it becomes `<path>.1`."""
    keep: int = Field(default=5, ge=1, le=1000, json_schema_extra=RESTART)
    """How many old ones are kept."""


class LedgerConfig(Section):
    """One row for every request, in the database."""

    jsonl: JsonlConfig | None = Field(default=None, json_schema_extra=RESTART)
    """Also write a cost log; null: none."""
    intents: int = Field(default=4096, ge=16, le=1_048_576, json_schema_extra=RESTART)
    """Requests in flight in one worker that survive its death as a row."""


class LoggingConfig(Section):
    """The log, on stderr. It never holds prompts, answers or keys."""

    level: Literal["debug", "info", "warning", "error"] = Field(default="info", json_schema_extra=RESTART)
    """The least severe that is written."""
    format: Literal["auto", "json", "text"] = Field(default="auto", json_schema_extra=RESTART)
    """`auto`: text on a terminal, else JSON lines."""
    access: bool = Field(default=True, json_schema_extra=RESTART)
    """One line for each request."""


class SessionsConfig(Section):
    """How requests of one conversation are recognised, so that they go where its prefix is cached."""

    headers: tuple[HeaderName, ...] = (
        "x-session-affinity",
        "x-session-id",
        "session-id",
        "session_id",
        "x-claude-code-session-id",
        "x-opencode-session",
    )
    """Request headers that may hold a session id, first match wins; then the body's `prompt_cache_key`."""


class TargetConfig(Section):
    """One way to serve a model: a pool or a provider, and the model's name there."""

    pool: str | None = None
    """A name under `pools`."""
    provider: str | None = None
    """A name under `providers`, or a known provider's."""
    model: str | None = Field(default=None, min_length=1)
    """The model's name there; the public name if not given."""
    price: PriceConfig | None = None
    """What it costs there, before all other prices."""
    deadlines: DeadlinesConfig | None = None
    """How long it may take for this model; what is not given is as for its pool or provider."""
    weight: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Its share of the requests, relative to the other targets; without one, beside targets that have, it is a spare.
    No weights at all: the first target gets everything it can take."""

    @model_validator(mode="after")
    def _has_one_upstream(self) -> "TargetConfig":
        if (self.pool is None) == (self.provider is None):
            raise ValueError("needs either pool or provider")
        return self

    @property
    def upstream(self) -> str:
        return self.pool or self.provider or ""


class ModelConfig(Section):
    """A model as callers name it."""

    targets: tuple[TargetConfig, ...] = Field(min_length=1)
    """Ways to serve it, in order of preference."""
    price: PriceConfig | None = None
    """What it costs, for targets without a price of their own."""
    aliases: tuple[str, ...] = ()
    """Further names for it."""
    split_by: SplitBy = "session"
    """With weights: what stays with the target that it drew, a `session`, a `caller` (a key), or nothing but the
    `request`."""
    fallbacks: tuple[FallbackConfig, ...] = ()
    """Models that answer when this one cannot, in this order."""
    shadows: tuple[ShadowConfig, ...] = ()
    """Models that get copies of its requests."""
    async_price_factor: Decimal = Field(default=Decimal(1), ge=0, le=100)
    """What a request through the queue costs (a batch's, a background response, a job; not one that was only held), times
    the price. The ledger's `price_source` tells it: `config x 0.5`."""
    on_full: Literal["wait", "fallback", "queue", "reject", "hold"] | None = None
    """What happens when all of its endpoints are full, unless the request or a rule says it; null: wait, then the next
    target, then the queue for those who asked for it. `hold` and `queue` make a job of it at once (docs/queue.md)."""
    context_tokens: int | None = Field(default=None, ge=1)
    """Its context window. A prompt that is estimated to be longer falls back for `context` before it is sent; null:
    the upstream's answer tells."""


class PricesConfig(Section):
    """Where prices come from beyond the public price data."""

    unknown: Literal["warn", "block"] = "warn"
    """A model without a price: serve it and count it as unpriced, or refuse it."""
    overrides: dict[str, PriceConfig] = Field(default_factory=dict)
    """By `{provider or pool}/{model}`; the model may end in `*`, the longest match wins."""


class Config(Section):
    """The whole file."""

    server: ServerConfig = ServerConfig()
    management: ManagementConfig = ManagementConfig()
    storage: StorageConfig = StorageConfig()
    ledger: LedgerConfig = LedgerConfig()
    logging: LoggingConfig = LoggingConfig()
    keys: tuple[KeyConfig, ...] = ()
    teams: dict[str, TeamConfig] = Field(default_factory=dict)
    limits: CallerLimitsConfig = CallerLimitsConfig()
    alerts: AlertsConfig = AlertsConfig()
    sessions: SessionsConfig = SessionsConfig()
    idempotency: IdempotencyConfig = IdempotencyConfig()
    outbound: OutboundConfig = OutboundConfig()
    providers: dict[Annotated[str, AfterValidator(upstream_name)], ProviderConfig] = Field(
        default_factory=dict
    )
    pools: dict[Annotated[str, AfterValidator(upstream_name)], PoolConfig] = Field(default_factory=dict)
    engines: EnginesConfig = EnginesConfig()
    models: dict[str, ModelConfig] = Field(default_factory=dict)
    rules: tuple[RuleConfig, ...] = ()
    prices: PricesConfig = PricesConfig()
    overload: PrioritiesConfig = PrioritiesConfig()
    queue: QueueConfig = QueueConfig()

    def enabled_providers(self) -> dict[str, PoolSettings]:
        """Those that have what they need: listed here, or known and found in the environment when this was loaded."""
        return {
            name: provider.resolve(name, self.outbound)
            for name, provider in self.providers.items()
            if provider.off_because(name) is None
        }

    def enabled_pools(self) -> dict[str, PoolSettings]:
        return {name: pool.resolve(name, self.outbound) for name, pool in self.pools.items() if pool.enabled}

    def served_models(self) -> dict[str, tuple[TargetConfig, ...]]:
        """The targets that are on, by public name; models without one are left out."""
        served = {name: tuple(filter(self._is_on, model.targets)) for name, model in self.models.items()}
        return {name: targets for name, targets in served.items() if targets}

    def enabled_keys(self) -> tuple[KeyConfig, ...]:
        """Caller keys that are not empty."""
        return tuple(entry for entry in self.keys if entry.key.get_secret_value())

    def declared_keys(self) -> tuple[DeclaredKey, ...]:
        """What the keyring takes: callers' and operators' keys that are not empty."""
        callers = tuple(entry.declared() for entry in self.enabled_keys())
        return callers + tuple(e.declared() for e in self.management.keys if e.key.get_secret_value())

    def aliases(self) -> dict[str, str]:
        """Public names of models by their other names."""
        return {alias: name for name, model in self.models.items() for alias in model.aliases}

    def declared(self) -> Declared:
        """The teams and limits written here; a key's name stands for its id."""
        key_ids = {entry.name: f"config:{entry.name}" for entry in self.keys}
        return Declared(self.teams, self.limits.declared(key_ids))

    def pepper(self) -> str | None:
        return None if self.storage.pepper is None else self.storage.pepper.get_secret_value()

    def target_off_because(self, target: TargetConfig) -> str | None:
        """Why nothing is sent to this target; None when it is on."""
        if target.pool is not None:
            return None if self.pools[target.pool].enabled else f"the pool {target.pool}: enabled is false"
        assert target.provider is not None
        provider = self.providers.get(target.provider) or ProviderConfig()
        reason = provider.off_because(target.provider)
        return reason and f"{target.provider}: {reason}"

    def notes(self) -> list[str]:
        """What the operator may want to know: providers with a key that are off, models that are not served."""
        notes = []
        for name, provider in self.providers.items():
            reason = provider.off_because(name)
            if (
                reason is not None
                and provider.enabled
                and provider.api_key
                and provider.api_key.get_secret_value()
            ):
                notes.append(f"providers.{name}: off ({reason})")
        served = self.served_models()
        for name, model in self.models.items():
            if name not in served:
                reasons = "; ".join(dict.fromkeys(filter(None, map(self.target_off_because, model.targets))))
                notes.append(f"models.{name}: not served ({reasons})")
            if model.on_full in {"hold", "queue"} and not self.queue.enabled:
                notes.append(f"models.{name}.on_full: as if it said nothing (queue.enabled is false)")
        return notes

    def to_json(self) -> bytes:
        """Everything, secrets included, for a worker of ours."""
        return self.model_dump_json(exclude_unset=True, context={"reveal": True}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Config":
        return cls.model_validate_json(data)

    def _is_on(self, target: TargetConfig) -> bool:
        return self.target_off_because(target) is None


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """The configuration in this file. Raises ConfigError with every problem."""
    document = read_document(path, environ)
    _add_environment(document, environ)
    problems = [
        *document.problems,
        *reference_problems(document.values),
        *routing_problems(document.values),
    ]
    config: Config | None = None
    try:
        config = Config.model_validate(document.values, context={"directory": path.absolute().parent})
    except ValidationError as error:
        known = {problem.location for problem in problems}
        problems += [p for p in explain(error, Config, document.values) if p.location not in known]
    if config is not None:
        listeners = {"server.port": config.server.port, "management.port": config.management.port}
        problems += engine_problems(config.pools, listeners)
    if config is None or problems:
        raise ConfigError(path, list(dict.fromkeys(map(document.complete, problems))))
    return config


def load_storage(path: Path, environ: Mapping[str, str]) -> StorageConfig:
    """Where the database is, for commands beside the service: what is wrong elsewhere in the file does not matter.

    Raises ConfigError with the problems of that section, or of the file as a whole.
    """
    document = read_document(path, environ)
    _add_environment(document, environ)
    values = {"storage": document.values["storage"]}
    problems = [problem for problem in document.problems if problem.location[:1] in ((), ("storage",))]
    try:
        config = Config.model_validate(values, context={"directory": path.absolute().parent})
    except ValidationError as error:
        known = {problem.location for problem in problems}
        problems += [problem for problem in explain(error, Config, values) if problem.location not in known]
    if problems:
        raise ConfigError(path, list(dict.fromkeys(map(document.complete, problems))))
    return config.storage


def _add_environment(document: Document, environ: Mapping[str, str]) -> None:
    """Known providers whose variables are set, under what the file says of them."""
    storage = document.values.setdefault("storage", {})
    if isinstance(storage, dict):
        storage.setdefault("directory", _DIRECTORY)  # set, so that it is anchored and travels to the workers
    providers = document.values.setdefault("providers", {})
    if not isinstance(providers, dict):
        return
    for name, settings in providers_in(environ).items():
        listed = providers.setdefault(name, {})
        if listed is None:
            listed = providers[name] = {}
        if isinstance(listed, dict):
            for key, value in settings.items():
                listed.setdefault(key, value)
