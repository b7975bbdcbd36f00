"""`headgate engine plan` and `presets`: what would be run, and what is known of families of models.

Starts nothing. What is secret is shown as a placeholder, so that the output can be sent to somebody.
"""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer
from rich.console import Console
from rich.markup import escape

from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH, Config, load
from gateway.config_file import ConfigError
from local_engine.free_ports import FreePorts
from local_engine.gpus import Gpu, Machine, this_machine
from local_engine.orders import orders_of
from local_engine.plan import (
    PLACEHOLDER,
    EngineEndpoint,
    MemoryEstimate,
    PlanError,
    PoolPlan,
    RemotePart,
    ReplicaPlan,
    Site,
)
from local_engine.planning import plan_pools
from local_engine.presets import presets as known_presets
from local_engine.run_directory import run_directory

_GIB: Final = 1 << 30
_COLUMNS: Final = (
    Column("preset"),
    Column("for", folds=True),
    Column("tools"),
    Column("reasoning"),
    Column("experts"),
    Column("names", folds=True, rank=1),
)

ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


def plan(
    config_path: ConfigOption = DEFAULT_PATH,
    pool: Annotated[str | None, typer.Option(help="This pool only, even if it is switched off.")] = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="COUNTxGIB", help="For a machine with such GPUs, e.g. 8x80, not this one."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show the commands, ports, GPUs and memory of the engines, and start nothing."""
    machine = this_machine(os.environ)
    if gpus is not None:
        machine = replace(machine, gpus=_supposed(gpus))
    try:
        config = load(config_path, os.environ)
        plans = planned(config, machine, pool)
    except ConfigError as error:
        for line in error.lines:
            typer.echo(line, err=True)
        raise typer.Exit(1) from None
    except PlanError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(orjson.dumps([described(plan) for plan in plans], option=orjson.OPT_INDENT_2).decode())
    elif plans:
        _print(plans, machine)
    else:
        typer.echo("No pool that is switched on has a vllm block.")


def _supposed(text: str) -> tuple[Gpu, ...]:
    found = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,4})", text)
    if found is None:
        raise typer.BadParameter("is written COUNTxGIB, e.g. 8x80", param_hint="--gpus")
    count, gib = map(int, found.groups())
    return tuple(Gpu(n, f"GPU-{n:08x}", f"GPU of {gib} GiB", gib * _GIB) for n in range(count))


def planned(config: Config, machine: Machine, only: str | None = None) -> list[PoolPlan]:
    """The plans of all pools that run vLLM, or of one. PlanError when there is none of that name, or no room."""
    specs = {
        name: found.vllm
        for name, found in config.pools.items()
        if found.vllm is not None and (found.enabled if only is None else name == only)
    }
    if only is not None and not specs:
        raise PlanError(f'there is no pool "{only}" with a vllm block')
    site = Site(machine, FreePorts(), run_directory(config.storage.directory), PLACEHOLDER)
    orders_of(specs, site)  # there must be room for all that pools may grow to, too
    return list(plan_pools(specs, site).values())


def described(plan: PoolPlan) -> dict[str, Any]:
    """As plain values without secrets."""
    return {
        "pool": plan.name,
        "models": plan.models,
        "notes": plan.notes,
        "replicas": [_replica(replica) for replica in plan.replicas],
        "remote": [_remote(part) for part in plan.remote],
    }


def _replica(replica: ReplicaPlan) -> dict[str, Any]:
    return {
        "name": replica.name,
        "role": replica.role,
        "command": replica.argv,
        "env": replica.shown_env(),
        "host": replica.host,
        "ports": replica.ports,
        "gpus": [{"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name} for gpu in replica.gpus],
        "endpoints": [_endpoint(endpoint) for endpoint in replica.endpoints],
        "memory": _memory(replica.memory),
        "start_timeout_s": replica.start_timeout_s,
        "drain_timeout_s": replica.drain_timeout_s,
        "stop_timeout_s": replica.stop_timeout_s,
    }


def _remote(part: RemotePart) -> dict[str, Any]:
    return {
        "replica": part.replica,
        "node": part.node,
        "command": part.argv,
        "env": part.shown_env(),
        "endpoints": [_endpoint(endpoint) for endpoint in part.endpoints],
    }


def _endpoint(endpoint: EngineEndpoint) -> dict[str, Any]:
    return {
        "name": endpoint.name,
        "base_url": endpoint.base_url,
        "rank": endpoint.rank,
        "kv_events": endpoint.kv_events,
    }


def _memory(memory: MemoryEstimate) -> dict[str, int]:
    """Of each device; 0: not known."""
    return {
        "weights_bytes": memory.weights_bytes,
        "available_bytes": memory.available_bytes,
        "cache_bytes": memory.kv_bytes,
        "cache_tokens": memory.kv_tokens,
    }


def _print(plans: list[PoolPlan], machine: Machine) -> None:
    console = Console()
    gpus = f"{len(machine.gpus)} GPUs" if machine.gpus else "no GPU"
    console.print(
        f"This machine: {gpus}, {machine.cpus} cores, {machine.memory_bytes / _GIB:.0f} GiB of memory."
    )
    console.print(
        "Ports are free ones, and others at each start, unless a pool's `port` says which.", soft_wrap=True
    )
    for plan in plans:
        console.print(
            f"\n[bold]{escape(plan.name)}[/] serves {escape(', '.join(plan.models))}", highlight=False
        )
        for note in plan.notes:
            console.print(f"  note: {escape(note)}", highlight=False, soft_wrap=True)
        for replica in plan.replicas:
            _print_replica(console, replica)
        for part in plan.remote:
            console.print(
                f"\n  on {escape(part.node)}, for you to start there:", highlight=False, soft_wrap=True
            )
            _print_command(console, part.argv, part.shown_env())


def _print_replica(console: Console, replica: ReplicaPlan) -> None:
    role = "" if replica.role == "both" else f" ({replica.role})"
    console.print(f"\n  [bold]{escape(replica.name)}[/]{role}", highlight=False, soft_wrap=True)
    elsewhere = "GPUs that Ray gives it" if "ray" in replica.argv else "the CPU"
    where = ", ".join(f"{gpu.index} {gpu.name} {gpu.uuid}" for gpu in replica.gpus) or elsewhere
    console.print(f"    on       {escape(where)}", highlight=False, soft_wrap=True)
    for endpoint in replica.endpoints:
        rank = "" if endpoint.rank is None else f", rank {endpoint.rank}"
        console.print(
            f"    endpoint {escape(endpoint.name)} {endpoint.base_url}{rank}", highlight=False, soft_wrap=True
        )
    console.print(f"    memory   {_memory_text(replica.memory)}", highlight=False, soft_wrap=True)
    _print_command(console, replica.argv, replica.shown_env())


def _print_command(console: Console, argv: tuple[str, ...], env: Mapping[str, str]) -> None:
    words = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
    console.print(f"    {escape(' '.join([*words, shlex.join(argv)]))}", highlight=False, soft_wrap=True)


def _memory_text(memory: MemoryEstimate) -> str:
    parts = []
    if memory.weights_bytes:
        parts.append(f"weights about {memory.weights_bytes / _GIB:.1f} GiB on each device")
    if memory.available_bytes:
        parts.append(f"{memory.available_bytes / _GIB:.1f} GiB may be taken")
    if memory.kv_bytes:
        tokens = f" ({memory.kv_tokens:,} tokens)" if memory.kv_tokens else ""
        parts.append(f"cache {memory.kv_bytes / _GIB:.1f} GiB{tokens}")
    return ", ".join(parts) or "not known for this model"


def presets(as_json: JsonOption = False) -> None:
    """List the families of models that parsers and flags are known for."""
    found = known_presets().values()
    if as_json:
        rows = [
            {
                "name": preset.name,
                "title": preset.title,
                "matches": preset.matches,
                "mixture_of_experts": preset.mixture_of_experts,
                "tool_parser": preset.tool_parser,
                "reasoning_parser": preset.reasoning_parser,
                "args": preset.args,
                "source": preset.source,
            }
            for preset in found
        ]
        typer.echo(orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode())
        return
    print_table(
        _COLUMNS,
        [
            (
                preset.name,
                preset.title,
                preset.tool_parser or "-",
                preset.reasoning_parser or "-",
                "yes" if preset.mixture_of_experts else "no",
                ", ".join(preset.matches),
            )
            for preset in found
        ],
    )
