"""`headgate engine top`: what each engine is doing, again and again, asked of the running service."""

import json
import time
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from gateway.commands.plane import JsonOption, OperatorOption, Plane, ServiceOption, UrlOption, find_plane
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH

_COLUMNS: Final = (
    Column("Engine"),
    Column("State"),
    Column("Running", is_number=True),
    Column("Waiting", is_number=True),
    Column("KV", is_number=True),
    Column("Hits", is_number=True, rank=1),
    Column("Prompt/s", is_number=True, rank=2),
    Column("Output/s", is_number=True, rank=2),
    Column("GPU", is_number=True, rank=3),
    Column("GPU mem", is_number=True, rank=4),
    Column("Cache known", rank=5),
    Column("Seen", is_number=True, rank=6),
)


def top(
    url: UrlOption = "",
    key: OperatorOption = "",
    config_path: ServiceOption = DEFAULT_PATH,
    *,
    every_s: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between two looks.")] = 2.0,
    is_once: Annotated[bool, typer.Option("--once", help="Look once.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Every engine's requests, memory, cache hits, speed and GPU, live. Of external engines as well."""
    plane = find_plane(url, key, config_path)
    console = Console()
    while True:
        engines = _engines(plane)
        if as_json:
            print(json.dumps({"engines": engines}), flush=True)
        else:
            if not is_once and console.is_terminal:
                console.clear()
            _show(engines, console)
        if is_once:
            return
        try:
            time.sleep(every_s)
        except KeyboardInterrupt:
            return


def _engines(plane: Plane) -> list[dict[str, Any]]:
    """Endpoints that tell their load, or that Headgate runs; with the figures of their GPUs."""
    replicas = {
        endpoint: replica
        for pool in plane.ask("/api/engines")["pools"]
        for replica in pool["replicas"]
        for endpoint in replica["endpoints"]
    }
    found = []
    for told in plane.ask("/api/status")["endpoints"]:
        replica = replicas.get(told["name"])
        if replica is None and told["running"] is None:
            continue
        engine = dict(told)
        if replica is not None:
            engine["state"] = told["state"] if replica["state"] == "ready" else replica["state"]
            engine |= {name: replica[name] for name in ("gpu", "gpu_memory") if name in replica}
        found.append(engine)
    return found


def _show(engines: list[dict[str, Any]], console: Console) -> None:
    if not engines:
        console.print("No engine tells its load: pools of vLLM and simulators do.", soft_wrap=True)
        return
    print_table(_COLUMNS, [_row(engine) for engine in engines], console=console)


def _row(engine: dict[str, Any]) -> list[str]:
    events, age_s = engine.get("kv_events"), engine["load_age_s"]
    return [
        engine["name"],
        engine["state"],
        _number(engine["running"]),
        _number(engine["waiting"]),
        _share(engine["kv_usage"]),
        _share(engine.get("hit_rate")),
        _number(engine.get("prompt_tokens_per_s")),
        _number(engine.get("generation_tokens_per_s")),
        _share(engine.get("gpu")),
        _share(engine.get("gpu_memory")),
        "" if events is None else f"{events}, {engine['kv_blocks']} blocks",
        "" if age_s is None else f"{age_s:.1f} s ago",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
