"""Makes plans: who gets which GPUs, ports and sockets, and what the commands are.

Owns the assignment; the flags are in `command`, the types in `plan`. Refuses to start, to listen and to look at the
machine: it is given one. GPUs are given out in order, to pools that name theirs first, so that the same configuration on
the same machine gives the same plan.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from local_engine.command import (
    API_KEY_VARIABLE,
    Seat,
    arguments,
    cpu_cache_bytes,
    environment,
    inherited,
    shutdown_timeout_s,
)
from local_engine.gpus import Gpu, find
from local_engine.plan import (
    EngineEndpoint,
    MemoryEstimate,
    PlanError,
    PoolPlan,
    RemotePart,
    ReplicaPlan,
    Site,
)
from local_engine.presets import Model, describe
from local_engine.vllm_config import VllmConfig

# After vLLM's own --shutdown-timeout: it takes a few seconds to leave.
_LEAVE_S: Final = 5.0
_SOCKET_PATH_BYTES: Final = 107  # sun_path of unix(7), less its zero
_DEFAULT_SHARE: Final = 0.92  # vLLM's --gpu-memory-utilization
_EXPERT_SHARE: Final = 0.95  # of a mixture's weights; the rest is on every rank
_REMOTE_PORT: Final = 8000


def model_of(spec: VllmConfig) -> Model:
    """What is known of the spec's model: from its folder if it is one that is here, else from its name."""
    folder = Path(spec.model).expanduser()
    return describe(spec.model, spec.preset, folder if folder.is_dir() else None)


def by_claim(specs: Mapping[str, VllmConfig]) -> list[str]:
    """The order in which pools get their GPUs: those that name them go first."""
    return sorted(specs, key=lambda name: not isinstance(specs[name].gpus, tuple))


def plan_pools(specs: Mapping[str, VllmConfig], site: Site) -> dict[str, PoolPlan]:
    """All pools of a configuration, in its order. PlanError when they do not fit together."""
    taken, plans = set(site.taken), dict[str, PoolPlan]()
    for name in by_claim(specs):
        plans[name] = plan_pool(name, specs[name], replace(site, taken=frozenset(taken)))
        taken.update(gpu.uuid for replica in plans[name].replicas for gpu in replica.gpus)
    return {name: plans[name] for name in specs}


def plan_pool(name: str, spec: VllmConfig, site: Site) -> PoolPlan:
    """Every slot of the spec. PlanError when the machine has not what it asks for."""
    taken, replicas = set(site.taken), list[ReplicaPlan]()
    for slot in range(spec.slots):
        replicas.append(plan_replica(name, spec, slot, replace(site, taken=frozenset(taken))))
        taken.update(gpu.uuid for gpu in replicas[-1].gpus)
    adapters = spec.lora.adapters if spec.lora is not None else {}
    return PoolPlan(
        name=name,
        models=(spec.served_name, *adapters),
        replicas=tuple(replicas),
        remote=tuple(_remote_parts(replicas[0], spec, site)),
        notes=tuple(_notes(spec, replicas[0])),
    )


def plan_replica(name: str, spec: VllmConfig, slot: int, site: Site) -> ReplicaPlan:
    """One slot, which may be beyond those of the spec: a pool that grows."""
    model, gpus = model_of(spec), assign_gpus(name, spec, slot, site)
    _check_folder(name, spec)
    seat = _seat(f"{name}/{slot}", spec, slot, site)
    cache_bytes = cpu_cache_bytes(spec, site.machine.memory_bytes) if spec.gpus == "none" else 0
    env = environment(spec, seat, site.api_key, tuple(gpu.uuid for gpu in gpus))
    shutdown_s = float(shutdown_timeout_s(spec))
    return ReplicaPlan(
        name=seat.name,
        pool=name,
        slot=slot,
        role=seat.role,
        argv=arguments(spec, model, seat, cache_bytes),
        env=env,
        secrets=frozenset({API_KEY_VARIABLE, *spec.env}),
        host=seat.host,
        port=seat.port,
        ports=tuple(range(seat.port, seat.port + _port_count(spec))),
        gpus=gpus,
        endpoints=tuple(_endpoints(spec, seat)),
        sockets=tuple(_sockets(seat)),
        side_channel_port=seat.side_channel_port,
        probe_model=spec.served_name,
        probes_embedding=_runner(spec) == "pooling",
        api_key=site.api_key,
        memory=_memory(spec, model, gpus, cache_bytes),
        start_timeout_s=spec.start_timeout_s,
        drain_timeout_s=spec.drain_timeout_s,
        stop_timeout_s=shutdown_s + _LEAVE_S,
        can_sleep=spec.sleep_mode,
    )


def process_env(plan: ReplicaPlan, environ: Mapping[str, str]) -> dict[str, str]:
    """The whole environment of a replica, given that of the parent, whose providers' keys stay out of it."""
    return inherited(environ) | dict(plan.env)


def assign_gpus(name: str, spec: VllmConfig, slot: int, site: Site) -> tuple[Gpu, ...]:
    """The GPUs of one slot: its part of the list, or the first that are free. PlanError when there are too few."""
    if spec.gpus == "none" or not spec.gpus_per_replica:
        return ()
    if not site.machine.gpus:
        raise PlanError(
            f"pools.{name}.vllm.gpus: no GPU was found on this machine. With GPUs: install the driver and "
            "`pip install 'headgate[vllm]'`; to run on the CPU, write gpus: none"
        )
    needed = spec.gpus_per_replica
    if isinstance(spec.gpus, tuple):
        wanted = spec.gpus[slot * needed : (slot + 1) * needed]
        if len(wanted) < needed:
            raise PlanError(f"pools.{name}.vllm.gpus: replica {slot} needs {needed} more than are listed")
        return tuple(_named(name, spec, gpu, site) for gpu in wanted)
    free = [gpu for gpu in site.machine.gpus if gpu.uuid not in site.taken]
    if needed > 1:
        free = [gpu for gpu in free if not gpu.is_slice]  # slices cannot work together
    if len(free) < needed:
        raise PlanError(
            f"pools.{name}.vllm: replica {slot} needs {needed} GPUs and {len(free)} of {len(site.machine.gpus)} are free; "
            "lower replicas, tensor_parallel_size, pipeline_parallel_size or data_parallel.size"
        )
    return tuple(free[:needed])


def _named(name: str, spec: VllmConfig, wanted: int | str, site: Site) -> Gpu:
    gpu = find(site.machine.gpus, wanted)
    if gpu is None:
        there = ", ".join(gpu.uuid if gpu.is_slice else str(gpu.index) for gpu in site.machine.gpus)
        hint = " (of a GPU cut by MIG, name the slices)" if isinstance(wanted, int) else ""
        raise PlanError(
            f"pools.{name}.vllm.gpus: there is no single GPU {wanted} here{hint}; there are {there}"
        )
    if gpu.uuid in site.taken and spec.gpu_memory_utilization is None:
        raise PlanError(
            f"pools.{name}.vllm.gpus: GPU {wanted} is another replica's. To share it, give both pools a "
            "gpu_memory_utilization, together less than 1"
        )
    return gpu


def _check_folder(name: str, spec: VllmConfig) -> None:
    if spec.model.startswith(("/", "./", "../", "~")) and not Path(spec.model).expanduser().is_dir():
        raise PlanError(f"pools.{name}.vllm.model: there is no folder {spec.model} on this machine")


def fixed_ports(spec: VllmConfig) -> range:
    """All that the spec's replicas listen on, where it says so itself; empty when they get free ones."""
    return range(0) if spec.port is None else range(spec.port, spec.port + spec.slots * _port_count(spec))


def _servers(spec: VllmConfig) -> int:
    """API servers of one replica on this machine that have a port of their own."""
    return spec.data_parallel.size_local if spec.data_parallel.mode == "external" else 1


def _port_count(spec: VllmConfig) -> int:
    """Of one replica: its servers, vLLM's supervisor where there are several, a side channel for each rank."""
    servers = _servers(spec)
    return servers + (servers > 1) + (spec.data_parallel.size_local if spec.roles is not None else 0)


def _seat(name: str, spec: VllmConfig, slot: int, site: Site) -> Seat:
    servers, count = _servers(spec), _port_count(spec)
    port = site.ports.take(name, count, spec.host) if spec.port is None else spec.port + slot * count
    after = port + servers + (servers > 1)
    events = replay = None
    # Ray starts all ranks with one command, and elsewhere the folder of the sockets is not there.
    is_here = spec.data_parallel.backend != "ray" or spec.data_parallel.size_local == spec.data_parallel.size
    if (
        is_here
        and spec.kv_events
        and spec.prefix_caching.enabled is not False
        and _runner(spec) == "generate"
    ):
        events, replay = (_socket(site.run_directory, name, what) for what in ("kv", "replay"))
    return Seat(
        name=name,
        role=spec.role(slot),
        host=spec.host,
        port=port,
        size_local=spec.data_parallel.size_local,
        supervisor_port=port + servers if servers > 1 else None,
        side_channel_port=after if spec.roles is not None else None,
        kv_events=events,
        kv_replay=replay,
    )


def _runner(spec: VllmConfig) -> str:
    return model_of(spec).runner if spec.runner == "auto" else spec.runner


def _socket(directory: Path, name: str, what: str) -> str:
    """A ZMQ endpoint. vLLM tells ranks apart only in names that hold `inproc`, by adding `_dp1` and so on."""
    path = directory / f"{name.replace('/', '-')}.inproc.{what}"
    if len(str(path)) + len("_dp999") > _SOCKET_PATH_BYTES:
        raise PlanError(
            f"the path of the socket {path} is too long: shorten the pool's name or storage.directory"
        )
    return f"ipc://{path}"


def _of_rank(endpoint: str | None, rank: int) -> str | None:
    return endpoint if endpoint is None or rank == 0 else f"{endpoint}_dp{rank}"


def _sockets(seat: Seat) -> Iterator[Path]:
    for endpoint in (seat.kv_events, seat.kv_replay):
        for rank in range(seat.start_rank, seat.start_rank + seat.size_local):
            found = _of_rank(endpoint, rank)
            if found is not None:
                yield Path(found.removeprefix("ipc://"))


def _endpoints(spec: VllmConfig, seat: Seat) -> Iterator[EngineEndpoint]:
    """One for each rank of the seat. An engine without data parallelism is rank 0."""
    data = spec.data_parallel
    for place in range(seat.size_local):
        rank = seat.start_rank + place
        port = seat.port + place if data.mode == "external" else seat.port
        yield EngineEndpoint(
            name=spec.endpoint_name(seat.name, rank),
            base_url=f"http://{_bracketed(seat.host)}:{port}/v1",
            rank=rank if data.size > 1 and data.mode != "external" else None,
            engine=str(rank),
            kv_events=_of_rank(seat.kv_events, rank),
            kv_replay=_of_rank(seat.kv_replay, rank),
        )
    if data.backend == "ray":
        # Those that Ray puts elsewhere are behind the same address.
        for rank in range(seat.size_local, data.size):
            name, address = (
                spec.endpoint_name(seat.name, rank),
                f"http://{_bracketed(seat.host)}:{seat.port}/v1",
            )
            yield EngineEndpoint(name=name, base_url=address, rank=rank, engine=str(rank))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _remote_parts(replica: ReplicaPlan, spec: VllmConfig, site: Site) -> Iterator[RemotePart]:
    """What runs on other machines. Their sockets cannot be reached from here, so they tell nothing of their caches."""
    data, model = spec.data_parallel, model_of(spec)
    rank = data.size_local
    for node in data.nodes:
        servers = node.size_local if data.mode == "external" else 1
        port = spec.port or _REMOTE_PORT
        seat = Seat(
            name=replica.name,
            role=replica.role,
            host=node.address,
            port=port,
            start_rank=rank,
            size_local=node.size_local,
            is_remote=True,
            supervisor_port=port + servers if servers > 1 else None,
        )
        yield RemotePart(
            replica=replica.name,
            node=node.address,
            argv=arguments(spec, model, seat, cpu_cache_bytes(spec, site.machine.memory_bytes)),
            env=environment(spec, seat, site.api_key, ()),
            secrets=replica.secrets,
            endpoints=_remote_endpoints(spec, seat, replica),
        )
        rank += node.size_local


def _remote_endpoints(spec: VllmConfig, seat: Seat, replica: ReplicaPlan) -> tuple[EngineEndpoint, ...]:
    """Headless ranks are reached through the first machine."""
    found = tuple(_endpoints(spec, seat))
    if spec.data_parallel.mode != "internal":
        return found
    return tuple(replace(endpoint, base_url=replica.endpoints[0].base_url) for endpoint in found)


def _memory(spec: VllmConfig, model: Model, gpus: tuple[Gpu, ...], cache_bytes: int) -> MemoryEstimate:
    size, tensor = model.size, spec.tensor_parallel_size
    pieces = tensor * spec.pipeline_parallel_size
    weights = size.weights_bytes / pieces
    if spec.expert_parallel is not None:
        weights *= 1 - _EXPERT_SHARE + _EXPERT_SHARE / spec.data_parallel.size
    width = 1 if (spec.kv_cache_dtype or "").startswith("fp8") else 2
    layers = -(-size.layers // spec.pipeline_parallel_size)
    numbers = size.latent or 2 * -(-size.kv_heads // tensor) * size.head_size
    available = 0
    if gpus:
        share = spec.gpu_memory_utilization or _DEFAULT_SHARE
        available = int(min(gpu.memory_bytes for gpu in gpus) * share)
    return MemoryEstimate(
        weights_bytes=int(weights),
        kv_bytes_per_token=layers * numbers * width,
        kv_bytes=_cache_room(spec, available, int(weights), cache_bytes),
        available_bytes=available,
    )


def _cache_room(spec: VllmConfig, available: int, weights: int, cache_bytes: int) -> int:
    if spec.gpus == "none":
        return cache_bytes
    if spec.kv_cache_memory_bytes is not None:
        return spec.kv_cache_memory_bytes
    if not (available and weights):
        return 0
    return max(available - weights - available // 10, 0)  # a tenth goes to activations and CUDA graphs


def _notes(spec: VllmConfig, replica: ReplicaPlan) -> Iterator[str]:
    model, memory = model_of(spec), replica.memory
    if model.preset is not None:
        yield (
            f"preset {model.preset.name} ({model.preset.title}), by the model's name"
            if spec.preset is None
            else (f"preset {model.preset.name} ({model.preset.title})")
        )
        if model.preset.note and spec.chat_template is None:
            yield model.preset.note
    elif model.alike is not None:
        yield f"no preset has this name; its architecture is that of {model.alike.name} (set preset: {model.alike.name})"
    elif spec.preset is None:
        yield "no preset has this name: without tool_parser and reasoning_parser, answers are plain text"
    if "ray" in (spec.distributed_executor_backend, spec.data_parallel.backend):
        yield "Ray's cluster has to be there first: `ray start --head` here, `ray start --address HERE:6379` on the others"
    if spec.scale is not None and spec.scale.max > spec.slots:
        yield f"may grow to {spec.scale.max} replicas, for which GPUs are set aside"
    if spec.expert_parallel is not None and spec.mixture_of_experts is None and model.is_moe is None:
        yield "it is not known whether the model is a mixture of experts; vLLM refuses expert_parallel if not"
    if memory.available_bytes and memory.weights_bytes > memory.available_bytes:
        yield (
            f"its weights (about {memory.weights_bytes / 1e9:.0f} GB on each GPU) may not fit in the "
            f"{memory.available_bytes / 1e9:.0f} GB that the engine may take: raise tensor_parallel_size, or choose "
            "smaller weights"
        )
    elif isinstance(spec.max_model_len, int) and 0 < memory.kv_tokens < spec.max_model_len:
        yield f"about {memory.kv_tokens} tokens of cache fit, less than one sequence of max_model_len"
    if isinstance(spec.gpus, tuple) and len(spec.gpus) > spec.slots * spec.gpus_per_replica:
        spare = len(spec.gpus) - spec.slots * spec.gpus_per_replica
        yield f"{spare} of the listed GPUs are kept for growth"
