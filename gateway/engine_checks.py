"""What is wrong with the `vllm` blocks of a configuration, in sentences that say what to change.

Owns the checks between pools; those within one are `local_engine.vllm_checks`. Looks at no machine: a configuration is
as good here as where it will run. Pools that are switched off are checked like the others.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations

from backends.config import PoolConfig
from gateway.config_file import Problem
from local_engine.planning import fixed_ports, model_of
from local_engine.vllm_checks import preset_problem, spec_problems
from local_engine.vllm_config import VllmConfig


def engine_problems(pools: Mapping[str, PoolConfig], listeners: Mapping[str, int]) -> Iterator[Problem]:
    """`listeners` are Headgate's own ports, by the name of their setting."""
    specs = {name: pool.vllm for name, pool in pools.items() if pool.vllm is not None}
    for name, spec in specs.items():
        unknown = preset_problem(spec)
        for path, message in (unknown,) if unknown is not None else spec_problems(spec, model_of(spec)):
            yield Problem(("pools", name, "vllm", *path), message)
        yield from _key_problems(name, pools[name], spec)
    enabled = {name: spec for name, spec in specs.items() if pools[name].enabled}
    yield from _port_problems(enabled, listeners)
    yield from _gpu_problems(enabled)


def _key_problems(name: str, pool: PoolConfig, spec: VllmConfig) -> Iterator[Problem]:
    has_key = pool.api_key is not None and pool.api_key.get_secret_value()
    if pool.enabled and spec.data_parallel.nodes and spec.data_parallel.mode != "internal" and not has_key:
        message = "is needed with data_parallel.nodes: the engines on other machines have to be started with it, too"
        yield Problem(("pools", name, "api_key"), message)


def _port_problems(specs: Mapping[str, VllmConfig], listeners: Mapping[str, int]) -> Iterator[Problem]:
    for name, spec in specs.items():
        ports = fixed_ports(spec)
        place = ("pools", name, "vllm", "port")
        if ports.stop > 65536:
            yield Problem(
                place, f"its engines need {len(ports)} ports, and those end at 65535: choose a lower one"
            )
        for setting, port in listeners.items():
            if port in ports:
                yield Problem(
                    place, f"{port} is also {setting}: engines have {ports.start} to {ports.stop - 1}"
                )
    for (first, one), (second, other) in combinations(specs.items(), 2):
        ports, others = fixed_ports(one), fixed_ports(other)
        if max(ports.start, others.start) < min(ports.stop, others.stop) and one.host == other.host:
            yield Problem(
                ("pools", second, "vllm", "port"),
                f"its engines have {others.start} to {others.stop - 1}, and those of {first} {ports.start} to "
                f"{ports.stop - 1}: set it to {ports.stop} or more",
            )


def _gpu_problems(specs: Mapping[str, VllmConfig]) -> Iterator[Problem]:
    named = {name: set(spec.gpus) for name, spec in specs.items() if isinstance(spec.gpus, tuple)}
    for (first, one), (second, other) in combinations(named.items(), 2):
        both = sorted(map(str, one & other))
        shares = [specs[name].gpu_memory_utilization for name in (first, second)]
        if both and (None in shares or sum(filter(None, shares)) > 1):
            yield Problem(
                ("pools", second, "vllm", "gpus"),
                f"{', '.join(both)} is also the pool {first}'s: list others, or give both pools a gpu_memory_utilization, "
                "together at most 1",
            )
