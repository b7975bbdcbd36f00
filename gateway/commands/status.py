"""`headgate status`: what the running service says of itself, asked for on the management plane."""

import json
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from gateway.commands.plane import OperatorOption, ServiceOption, UrlOption, find_plane
from gateway.commands.storage import fail
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH

_ENDPOINTS: Final = (
    Column("Endpoint"),
    Column("State"),
    Column("Why", folds=True, rank=3),
    Column("Running", is_number=True, rank=4),
    Column("Waiting", is_number=True, rank=5),
    Column("KV", is_number=True, rank=6),
    Column("Load seen", is_number=True, rank=7),
)


def status(
    url: UrlOption = "",
    key: OperatorOption = "",
    config_path: ServiceOption = DEFAULT_PATH,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Workers, endpoints and their health, as the running service sees them."""
    plane = find_plane(url, key, config_path)
    told = plane.ask("/api/status")
    if not isinstance(told, dict) or "workers" not in told:
        fail(f"What answers at {plane.url} is not a management plane of Headgate.")
    if as_json:
        print(json.dumps(told, indent=2))
        return
    console = Console()
    workers = ", ".join(f"{worker['name']} {worker['state']}" for worker in told["workers"])
    ready = "ready" if told["is_ready"] else "not ready"
    console.print(
        f"Headgate {told['version']}, {ready}, up {told['uptime_s']} s; {workers}",
        highlight=False,
        soft_wrap=True,
    )
    if told["endpoints"]:
        print_table(_ENDPOINTS, [_row(endpoint) for endpoint in told["endpoints"]])
    out = [endpoint["name"] for endpoint in told["endpoints"] if endpoint["state"] == "out"]
    if out:
        console.print(f"Left out: {', '.join(out)}.", highlight=False, soft_wrap=True)


def _row(endpoint: dict[str, Any]) -> list[str]:
    age_s, kv = endpoint["load_age_s"], endpoint["kv_usage"]
    return [
        endpoint["name"],
        endpoint["state"],
        endpoint["reason"],
        _number(endpoint["running"]),
        _number(endpoint["waiting"]),
        "" if kv is None else f"{kv:.0%}",
        "" if age_s is None else f"{age_s:.1f} s ago",
    ]


def _number(value: int | None) -> str:
    return "" if value is None else str(value)
