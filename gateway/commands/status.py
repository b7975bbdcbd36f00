"""`headgate status`: what the running service says of itself, asked for on the management plane.

Knows of the service only where the plane is. The operator key is read from the environment, so that it
is neither in a process list nor in a shell's history.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from gateway.commands.storage import fail
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH, ConfigError, load

_TIMEOUT_S: Final = 10.0
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
    url: Annotated[
        str,
        typer.Option(
            "--url",
            envvar="HEADGATE_MANAGEMENT_URL",
            help="Where the management plane is; default: where the configuration has it.",
        ),
    ] = "",
    key: Annotated[
        str, typer.Option(envvar="HEADGATE_OPERATOR_KEY", help="An operator key; better set the variable.")
    ] = "",
    config_path: Annotated[
        Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
    ] = DEFAULT_PATH,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Workers, endpoints and their health, as the running service sees them."""
    told = _ask(url or _configured(config_path), key)
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


def _configured(path: Path) -> str:
    try:
        plane = load(path, os.environ).management
    except ConfigError as error:
        fail(str(error))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plane.host, plane.host)  # noqa: S104 - looked for, not bound
    return f"http://[{host}]:{plane.port}" if ":" in host else f"http://{host}:{plane.port}"


def _ask(url: str, key: str) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        fail("--url must begin with http:// or https://.")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(f"{url.rstrip('/')}/api/status", headers=headers)  # noqa: S310 - checked above
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - the scheme is checked above
            told = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            fail(_reason(error))
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        fail(
            f"Nothing that speaks for Headgate answers at {url} ({reason}). Is it running? --url says where."
        )
    if not isinstance(told, dict) or "workers" not in told:
        fail(f"What answers at {url} is not a management plane of Headgate.")
    return told


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"The management plane answered with status {error.code}."
