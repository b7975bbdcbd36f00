"""What the operator says about upstreams: providers, pools, their deadlines and how they are reached.

Owns the merge of a provider's record with the operator's settings, whose result (`PoolSettings`) is all that is
needed to open connections. Refuses to know models, prices and callers. A secret shows itself only in
`model_dump` with the context `{"reveal": True}`, which is how a worker gets it.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    WithJsonSchema,
    model_validator,
)

from backends.dialect import DIALECTS
from backends.discovery.config import DiscoveryConfig
from backends.health_config import HealthConfig
from backends.local_path import LocalPath
from backends.member import Member, Role
from backends.no_proxy import host_pattern, is_listed
from backends.origin import Origin, Proxy
from backends.placement_config import PlacementConfig
from backends.pool import EnginePriority
from backends.prefill_config import PrefillConfig
from backends.provider import Auth, Provider
from backends.registry import KNOWN
from backends.transport import Deadlines
from local_engine.config import Secret, Section, SimulatorConfig
from local_engine.vllm_config import VllmConfig

# Headers that frame a message or carry its credentials: never the client's or the operator's to set.
_FRAMING: Final = frozenset(
    {"connection", "content-length", "content-encoding", "expect", "host", "keep-alive", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "accept-encoding"}
)
_CREDENTIALS: Final = frozenset({"authorization", "proxy-authorization", "x-api-key", "api-key", "cookie"})
_HEADER_NAME: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
_DIRECT: Final = "direct"


def _blank_is_none(value: Any) -> Any:
    return None if value == "" else value


def _names(value: Any) -> tuple[str, ...] | None:
    if value is None or value == "*":
        return None
    if isinstance(value, list | tuple) and all(isinstance(item, str) and item for item in value):
        return tuple(value)
    raise ValueError('must be "*" or a list of names')


def _header_name(name: str) -> str:
    name = name.lower()
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f'"{name}" is not a valid header name')
    if name in _FRAMING:
        raise ValueError(f"the header {name} belongs to the transport and cannot be set here")
    return name


def _header_value(value: SecretStr) -> SecretStr:
    if not re.fullmatch(r"[\x20-\x7e\t]*", value.get_secret_value()):
        raise ValueError("it goes into a header, so it must be printable ASCII on one line")
    return value


def _client_header(name: str) -> str:
    if name in _CREDENTIALS:
        raise ValueError(f"the client's {name} never leaves the gateway")
    return name


def _known_type(value: str) -> str:
    if value in KNOWN:
        return value
    near = difflib.get_close_matches(value, KNOWN, 1)
    hint = f'; did you mean "{near[0]}"?' if near else f"; there are {', '.join(KNOWN)}"
    raise ValueError(f'there is no known provider "{value}"{hint}')


def _paths(value: dict[str, str]) -> dict[str, str]:
    for dialect, path in value.items():
        if dialect not in DIALECTS:
            raise ValueError(f'there is no dialect "{dialect}"; there are {", ".join(DIALECTS)}')
        if not re.fullmatch(r"/[!-~]*", path):
            raise ValueError(f"the path of {dialect} must start with / and hold no blanks")
    return value


def _base_url(value: str) -> str:
    Origin.parse(value)  # raises with a sentence that does not repeat the URL
    return value.rstrip("/")


def _proxy_url(value: SecretStr) -> SecretStr:
    if value.get_secret_value() != _DIRECT:
        Proxy.parse(value.get_secret_value())
    return value


def _ca_file(path: Path) -> Path:
    Origin.parse("https://ca-file.invalid", ca_file=str(path))  # reads it
    return path


CaFile = Annotated[LocalPath, AfterValidator(_ca_file)]
Names = Annotated[
    tuple[str, ...] | None,
    PlainValidator(_names),
    PlainSerializer(lambda names: "*" if names is None else list(names)),
    WithJsonSchema({"anyOf": [{"const": "*"}, {"type": "array", "items": {"type": "string"}}]}),
]
EVERY: Final[dict[str, Any]] = {"default": "*"}
BaseUrl = Annotated[str, AfterValidator(_base_url)]
ProxyUrl = Annotated[Secret, AfterValidator(_proxy_url)]
HeaderName = Annotated[str, AfterValidator(_header_name)]
ClientHeader = Annotated[str, AfterValidator(_header_name), AfterValidator(_client_header)]
HeaderValue = Annotated[Secret, AfterValidator(_header_value)]
KnownType = Annotated[str, AfterValidator(_known_type)]
Paths = Annotated[dict[str, str], AfterValidator(_paths)]
# For settings that may be null: `"${VAR:-}"` then means that they are not set.
BlankIsNone = BeforeValidator(_blank_is_none)


class DeadlinesConfig(Section):
    """How long an upstream may take. What is not given keeps its default."""

    connect_s: float = Field(default=5.0, gt=0)
    """Until the connection stands, TLS included."""
    first_byte_s: float = Field(default=600.0, gt=0)
    """From the request sent to the head of the answer; flex tiers and long prompts take minutes."""
    idle_s: float = Field(default=300.0, gt=0)
    """Between two pieces of an answer."""
    total_s: float = Field(default=3600.0, gt=0)
    """The whole request."""

    def resolve(self) -> Deadlines:
        return Deadlines(self.connect_s, self.first_byte_s, self.idle_s, self.total_s)

    def over(self, others: Deadlines) -> Deadlines:
        """`others`, with what is given here in its place."""
        return others._replace(**{name: getattr(self, name) for name in self.model_fields_set})


class OutboundConfig(Section):
    """How providers are reached. The environment's proxy variables are not read: say it here."""

    proxy: Annotated[ProxyUrl | None, BlankIsNone] = None
    """An HTTP proxy for all providers, `http://[user:password@]host:port`. Pools are reached directly."""
    no_proxy: tuple[Annotated[str, AfterValidator(host_pattern)], ...] = ()
    """Hosts reached without it: names with their subdomains, addresses, networks (`10.0.0.0/8`)."""
    ca_file: Annotated[CaFile | None, BlankIsNone] = None
    """PEM file of authorities to trust besides the system's."""

    def proxy_for(self, base_url: str) -> str | None:
        """The proxy that a request to this address goes through."""
        if self.proxy is None or is_listed(urlsplit(base_url).hostname or "", self.no_proxy):
            return None
        return self.proxy.get_secret_value()


class UpstreamConfig(Section):
    """What providers and pools have in common. What is not given comes from the provider's own record."""

    enabled: bool = True
    """`false` switches it off, whatever keys there are."""
    type: KnownType | None = None
    """The known provider that it speaks like: its paths, its way of taking a key, what it cannot bear."""
    api_key: HeaderValue | None = None
    """The upstream's key."""
    more_api_keys: tuple[HeaderValue, ...] = ()
    """Further keys: when one is refused (401, 403, 429) it rests, and the next is used. Empty ones are left out."""
    auth: Auth | None = None
    """The header that carries the key: `bearer` (Authorization), `x-api-key`, `api-key`, or `none`."""
    paths: Paths | None = None
    """Dialects it speaks and their paths after the base URL: `{chat: /chat/completions}`. Replaces the list."""
    drops: tuple[str, ...] | None = None
    """Top-level request fields it answers with an error, left out of requests to it. Replaces the list."""
    forwards: tuple[ClientHeader, ...] | None = None
    """Client headers it may see. Replaces the list; all others stay here."""
    may_ask_usage: bool | None = None
    """Whether it understands `stream_options.include_usage`; without it the cost of its streams is an estimate."""
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict)
    """Headers sent with every request, on top of the provider's own."""
    ca_file: Annotated[CaFile | None, BlankIsNone] = None
    """PEM file of authorities to trust for it, instead of `outbound.ca_file`."""
    verify: bool = True
    """`false` accepts any certificate. For tests."""
    deadlines: DeadlinesConfig = DeadlinesConfig()
    """How long it may take."""
    proxy: Annotated[ProxyUrl | None, BlankIsNone] = None
    """Its own HTTP proxy, or `direct` for none. Not given: for providers `outbound.proxy`, for pools none."""
    placement: PlacementConfig = PlacementConfig()
    """How an endpoint is chosen, and when one is full."""
    health: HealthConfig = HealthConfig()
    """When an endpoint is left out, and how its load is learned."""

    def _own_proxy(self) -> str | None:
        return self.proxy.get_secret_value() if self.proxy is not None else None

    def _more_keys(self) -> tuple[str, ...]:
        return tuple(filter(None, (key.get_secret_value() for key in self.more_api_keys)))

    def _key(self) -> str | None:
        return (self.api_key.get_secret_value() if self.api_key is not None else None) or None

    def _provider(self, name: str, record: Provider, base_url: str, prices: str | None) -> Provider:
        """The record with the operator's word over it."""
        own_headers = {header: value.get_secret_value() for header, value in self.headers.items()}
        return replace(
            record,
            name=name,
            base_url=base_url,
            prices=prices,
            auth=record.auth if self.auth is None else self.auth,
            paths=record.paths if self.paths is None else self.paths,
            drops=record.reserved | (record.drops if self.drops is None else frozenset(self.drops)),
            forwards=record.forwards if self.forwards is None else frozenset(self.forwards),
            may_ask_usage=record.may_ask_usage if self.may_ask_usage is None else self.may_ask_usage,
            headers={**record.headers, **own_headers},
        )


class ProviderConfig(UpstreamConfig):
    """An account at a provider. A known name fills in its data; another name needs `type` and `base_url`."""

    api_key: HeaderValue | None = None
    """Its key. Empty: the provider is off. Not given: the environment variable of a known provider; for another
    name with a `base_url`, none is sent."""
    base_url: Annotated[BaseUrl | None, BlankIsNone] = None
    """Where its API starts. Not given: its environment variable, then the known provider's own."""
    passthrough: bool = False
    """Whether `/{name}/...` reaches the provider's own paths as they are. Such requests are priced when their
    format is known."""
    prices: str | None = None
    """Its id in the price data (genai-prices); null: none. Not given: the known provider's, if it is reached at
    its own host."""
    models: Names = Field(default=None, json_schema_extra=EVERY)
    """Its models that callers may name as `{name}/{model}`: `*` or a list."""

    def off_because(self, name: str) -> str | None:
        """Why this provider is switched off; None when it is on."""
        record = self._record(name)
        is_known = name in KNOWN
        if not self.enabled:
            return "enabled is false"
        if self._key() is None and not self._needs_no_key(name):
            return (
                f"no key, set {record.key_env}" if is_known and record.key_env else "no key, set its api_key"
            )
        if not (self.base_url or record.base_url):
            return (
                f"no address, set {record.base_url_env}"
                if record.base_url_env
                else "no address, set its base_url"
            )
        return None

    def resolve(self, name: str, outbound: OutboundConfig) -> "PoolSettings":
        """Only for a provider that is on."""
        record = self._record(name)
        base_url = _without_doubled_version(self.base_url or record.base_url, record)
        proxy = self._own_proxy()
        return PoolSettings(
            name=name,
            provider=self._provider(name, record, base_url, self._prices(name, record, base_url)),
            base_urls=(base_url,),
            api_key=self._key(),
            deadlines=self.deadlines.resolve(),
            proxy=outbound.proxy_for(base_url) if proxy is None else None if proxy == _DIRECT else proxy,
            ca_file=_text(self.ca_file or outbound.ca_file),
            verify=self.verify,
            passthrough=self.passthrough,
            models=None if self.models is None else frozenset(self.models),
            placement=self.placement,
            more_api_keys=self._more_keys(),
            health=self.health,
        )

    def _record(self, name: str) -> Provider:
        return KNOWN[self.type or name]

    def _needs_no_key(self, name: str) -> bool:
        """An empty key means off; none at all is for upstreams without keys, and for addresses given here."""
        if self.api_key is not None:
            return False
        return self._record(name).key_env is None or (name not in KNOWN and self.base_url is not None)

    def _prices(self, name: str, record: Provider, base_url: str) -> str | None:
        if "prices" in self.model_fields_set:
            return self.prices
        if name in KNOWN or not record.base_url:
            return record.prices
        same_host = urlsplit(base_url).hostname == urlsplit(record.base_url).hostname
        return record.prices if same_host else None


class PoolConfig(UpstreamConfig):
    """Engines of your own that serve the same models: addresses, or engines that Headgate runs itself.

    A pool also takes `auth`, `paths`, `drops`, `forwards`, `may_ask_usage`, `headers`, `proxy`, `ca_file`, `verify`
    and `deadlines`, as a provider does.
    """

    api_key: HeaderValue | None = None
    """The engines' key (`vllm serve --api-key`). Empty or not given: none is sent."""
    enabled: bool = True
    """`false` switches it off."""
    type: KnownType | None = None
    """What kind of engine it is. Not given: `vllm`."""
    endpoints: tuple[BaseUrl, ...] = ()
    """Base URLs, one for each engine (or data-parallel rank)."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """What each endpoint gets relative to the others, in the same order; none: all the same."""
    roles: tuple[Role, ...] = ()
    """What each endpoint is for, in the same order: `prefill` (computes prompts), `decode` (answers), `both` (answers; prompts may be
    computed elsewhere); none: all are `both`, and nothing is computed apart."""
    prefill: PrefillConfig = PrefillConfig()
    """When a prompt is computed by another engine than the one that answers."""
    data_parallel_ranks: int = Field(default=1, ge=1, le=1024)
    """Ranks behind each address (vLLM's internal or hybrid balancing). Each has a cache of its own, so each is an
    endpoint of its own, named to vLLM by the header `X-data-parallel-rank`."""
    cache_salt: bool | None = None
    """Whether tenants' prefix caches are kept apart: `cache_salt` of every request is set here, never by a client
    alone. Without it, how quick an answer is may tell that somebody else sent the same beginning. Not given: yes for
    `vllm`, no for others."""
    priority: Literal["class", "client", "none"] | None = None
    """Who says in which order an engine runs requests (vLLM's `--scheduling-policy priority`; others refuse it):
    `class`, the request's, whatever a client writes in `priority`; `client`, what it writes, else the class; `none`,
    nothing is said. Not given: `class` for `vllm` that schedules so, else `none`."""
    simulator: SimulatorConfig | None = None
    """Run engine simulators instead."""
    vllm: VllmConfig | None = None
    """Run vLLM instead (docs/engine.md)."""
    discovery: DiscoveryConfig | None = None
    """Look endpoints up instead (docs/engine.md)."""

    @model_validator(mode="after")
    def _has_engines(self) -> "PoolConfig":
        sources = (self.simulator, self.vllm, self.discovery)
        if self.enabled and bool(self.endpoints) + sum(source is not None for source in sources) != 1:
            raise ValueError("needs one of endpoints, discovery, vllm and simulator")
        if len(set(self.endpoints)) != len(self.endpoints):
            raise ValueError("endpoints: the same address twice")
        if self.vllm is not None and (self.weights or self.data_parallel_ranks > 1):
            raise ValueError("weights and data_parallel_ranks are for endpoints; vllm has data_parallel")
        if self.vllm is not None and self.vllm.scheduling_policy == "fcfs" and self._engine_priority():
            raise ValueError(
                "priority: its engines do not schedule by it; set vllm.scheduling_policy: priority"
            )
        engines = len(self.endpoints) if self.simulator is None else self.simulator.replicas
        if self.weights and len(self.weights) != engines:
            raise ValueError("weights: must be as many as endpoints")
        if self.roles and len(self.roles) != len(self.endpoints):
            raise ValueError("roles: must be as many as endpoints")
        if self.roles and set(self.roles) == {"prefill"}:
            raise ValueError("roles: nobody answers; give at least one endpoint the role decode")
        return self

    def resolve(self, name: str, outbound: OutboundConfig) -> "PoolSettings":
        """Only for a pool that is on. The addresses of engines are known when they run, so there are none."""
        record = KNOWN[self.type or ("vllm" if self.simulator is None else "simulator")]
        proxy = self._own_proxy()
        return PoolSettings(
            name=name,
            provider=self._provider(name, record, "", None),
            base_urls=tuple(_without_doubled_version(url, record) for url in self.endpoints),
            simulator=self.simulator,
            api_key=self._key(),
            deadlines=self.deadlines.resolve(),
            proxy=None if proxy == _DIRECT else proxy,
            ca_file=_text(self.ca_file or outbound.ca_file),
            verify=self.verify,
            placement=self.placement,
            more_api_keys=self._more_keys(),
            health=self.health,
            weights=self.weights,
            roles=self.roles,
            prefill=self.prefill,
            ranks=self.data_parallel_ranks,
            is_salted=self.vllm is not None if self.cache_salt is None else self.cache_salt,
            priority=self._engine_priority(),
            members=() if self.vllm is None else _not_running(name, self.vllm),
        )

    def _engine_priority(self) -> EnginePriority:
        schedules = self.vllm is not None and self.vllm.scheduling_policy == "priority"
        wanted = ("class" if schedules else "none") if self.priority is None else self.priority
        return "" if wanted == "none" else wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSettings:
    """A pool ready to be built: a provider's account is a pool of one address.

    `models` is None when every upstream model may be named. The provider's headers may hold secrets, so it is
    left out of the repr like the key and the proxy.
    """

    name: str
    provider: Provider = field(repr=False)
    base_urls: tuple[str, ...]
    simulator: SimulatorConfig | None = None
    api_key: str | None = field(default=None, repr=False)
    deadlines: Deadlines
    proxy: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    verify: bool = True
    passthrough: bool = False
    models: frozenset[str] | None = None
    more_api_keys: tuple[str, ...] = field(default=(), repr=False)
    health: HealthConfig = field(default_factory=HealthConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    weights: tuple[float, ...] = ()  # by place in base_urls; empty: all the same
    roles: tuple[Role, ...] = ()  # by place in base_urls; empty: all `both`
    prefill: PrefillConfig = field(default_factory=PrefillConfig)
    ranks: int = 1  # data-parallel ranks behind each address
    is_salted: bool = False
    priority: EnginePriority = ""
    members: tuple[Member, ...] = ()  # instead of base_urls, where somebody else says who they are

    def all_members(self) -> tuple[Member, ...]:
        """In the pool's order; named by it where nobody named them."""
        if self.members:
            return self.members
        addresses = [(url, rank) for url in self.base_urls for rank in range(self.ranks)]
        return tuple(
            Member(
                # A provider's account is a pool of one.
                name=self.name if len(addresses) == 1 else f"{self.name}/{number}",
                base_url=url,
                rank=rank if self.ranks > 1 else None,
                weight=self.weights[number // self.ranks] if self.weights else 1.0,
                role=self.roles[number // self.ranks] if self.roles else "both",
            )
            for number, (url, rank) in enumerate(addresses)
        )


def _not_running(pool: str, spec: VllmConfig) -> tuple[Member, ...]:
    """The members of a pool whose engines nobody has started: named, closed, and nowhere."""
    return tuple(
        Member(name=name, base_url=f"http://127.0.0.1:{number + 1}", role=role, is_open=False)
        for number, (name, role) in enumerate(spec.endpoint_names(pool))
    )


def providers_in(environ: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What the environment says of known providers, by name: the settings `api_key` and `base_url`."""
    found: dict[str, dict[str, str]] = {}
    for name, record in KNOWN.items():
        settings = {"api_key": record.key_env, "base_url": record.base_url_env}
        values = {
            key: environ[variable] for key, variable in settings.items() if variable and environ.get(variable)
        }
        if values:
            found[name] = values
    return found


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _without_doubled_version(base_url: str, record: Provider) -> str:
    """Some write Anthropic's base URL with `/v1` and some without; its paths begin with it."""
    if all(path.startswith("/v1/") for path in record.paths.values()):
        return base_url.removesuffix("/v1")
    return base_url
