"""What a pool's engines will be, before any of them is started: commands, ports, GPUs, addresses, memory.

Owns the types that the supervisor executes and the gateway addresses. A plan is made from the spec, the machine and
nothing else, so that it can be shown and compared; the same spec on the same machine gives the same plan. Refuses to
start anything.

Invariants: a replica's `slot` is its place in the pool for ever, and its endpoints' names follow from pool, slot and
rank alone, so that a session finds its endpoint again after a restart. No secret is in `argv`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from local_engine.gpus import Gpu, Machine
from local_engine.vllm_config import Role

PLACEHOLDER: Final = "***"


class PlanError(Exception):
    """The spec asks for what this machine does not have. The message says what to change."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that one device of a replica needs at least, roughly. 0: not known."""

    weights_bytes: int
    kv_bytes_per_token: int  # of one sequence
    kv_bytes: int  # what is left for the cache
    available_bytes: int  # what the engine may take of the device; 0 on the CPU

    @property
    def kv_tokens(self) -> int:
        """Tokens of context that fit in the cache."""
        return self.kv_bytes // self.kv_bytes_per_token if self.kv_bytes_per_token else 0


@dataclass(frozen=True, slots=True)
class EngineEndpoint:
    """One prefix cache that requests can be sent to: an address, or one data-parallel rank behind it."""

    name: str  # pool/1, or pool/1.r0 where a replica has several
    base_url: str  # http://127.0.0.1:18100/v1
    rank: int | None  # what `X-data-parallel-rank` must say; None: the address leaves no choice
    engine: str  # the label `engine` of its series on the metrics page of its address
    kv_events: str | None = None  # ZMQ endpoint to subscribe to; None: no events
    kv_replay: str | None = None  # ZMQ endpoint that repeats what was missed


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One engine, to be run as one process group.

    `env` is over the parent's environment; those of its names in `secrets` must not be shown.
    """

    name: str  # pool/1
    pool: str
    slot: int
    role: Role = "both"
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    secrets: frozenset[str] = frozenset()
    host: str
    port: int  # of the first API server; readiness and probes go here when there is one address
    ports: tuple[int, ...]  # all that it listens on, `port` first
    gpus: tuple[Gpu, ...] = ()  # none: on the CPU
    endpoints: tuple[EngineEndpoint, ...]
    sockets: tuple[
        Path, ...
    ] = ()  # Unix sockets it makes; one left by a dead process is removed before the start
    side_channel_port: int | None = None  # of its KV connector, where pools have roles
    probe_model: str  # what the one-token probe asks for
    probes_embedding: bool = False  # the probe is /v1/embeddings: it cannot generate
    api_key: str = field(repr=False)
    memory: MemoryEstimate
    start_timeout_s: float  # from the start to the first probe answered; weights may have to be fetched
    drain_timeout_s: float  # for the requests it still has, once nothing more is sent to it
    stop_timeout_s: float  # from SIGTERM to SIGKILL of the group; longer than vLLM's own --shutdown-timeout
    can_sleep: bool = False

    def shown_env(self) -> dict[str, str]:
        """`env` with placeholders for what is secret."""
        return _shown(self.env, self.secrets)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemotePart:
    """What belongs to a replica but runs on another machine: for the operator to start there."""

    replica: str
    node: str  # the address of that machine
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(repr=False)
    secrets: frozenset[str] = frozenset()
    endpoints: tuple[
        EngineEndpoint, ...
    ] = ()  # of its ranks; those of a headless part are reached through the first

    def shown_env(self) -> dict[str, str]:
        """`env` with placeholders for what is secret."""
        return _shown(self.env, self.secrets)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """All of a pool. `models` are the upstream names its engines answer to: the model's, then its adapters'."""

    name: str
    models: tuple[str, ...]
    replicas: tuple[ReplicaPlan, ...]
    remote: tuple[RemotePart, ...] = ()
    notes: tuple[str, ...] = ()  # what the operator should know; nothing is wrong

    def endpoints(self) -> tuple[EngineEndpoint, ...]:
        """In the order of slots and ranks."""
        own = [endpoint for replica in self.replicas for endpoint in replica.endpoints]
        return (*own, *(endpoint for part in self.remote for endpoint in part.endpoints))


class Ports(Protocol):
    """Where ports come from: the machine, or a counter in a test."""

    def take(self, owner: str, count: int, host: str) -> int:
        """The first of `count` consecutive ports that nobody has; the same again for the same replica.

        PlanError when there are none.
        """


@dataclass(frozen=True, slots=True)
class Site:
    """What plans are made on: the machine and what is given out there.

    `taken` are the uuids of GPUs that other pools or replicas have. `run_directory` holds the Unix sockets; its
    path must be short (107 bytes with the file's name).
    """

    machine: Machine
    ports: Ports
    run_directory: Path
    api_key: str = field(repr=False)
    taken: frozenset[str] = frozenset()


def _shown(env: Mapping[str, str], secrets: frozenset[str]) -> dict[str, str]:
    return {name: PLACEHOLDER if name in secrets else value for name, value in env.items()}
