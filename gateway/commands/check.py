"""`headgate check`: is this configuration good, and what does it come to.

Builds the catalog that a worker would build, so what it shows is what would be served. Sends nothing.
"""

import os
import time
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer
from rich.console import Console
from rich.markup import escape

from gateway.catalog import CatalogBuilder, Upstreams
from gateway.commands.prices import price_text, usd_per_million_tokens
from gateway.commands.tables import Column, print_table
from gateway.compiled import build_name
from gateway.config import DEFAULT_PATH, Config, load
from gateway.config_file import ConfigError
from gateway.config_reference import schema as config_schema
from gateway.route_builder import routing_notes
from policies.prices import PriceBook

_COLUMNS: Final = (
    Column("model", folds=True),
    Column("target", folds=True),
    Column("upstream model", folds=True),
    Column("price of a million tokens", folds=True),
)


def check(
    config_path: Annotated[
        Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
    ] = DEFAULT_PATH,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of the file instead.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Say what is wrong with a configuration, or what it comes to."""
    if schema:
        typer.echo(orjson.dumps(config_schema(), option=orjson.OPT_INDENT_2).decode())
        return
    try:
        config = load(config_path, os.environ)
    except ConfigError as error:
        if as_json:
            typer.echo(orjson.dumps({"ok": False, "errors": error.lines}).decode())
        else:
            _print_errors(error)
        raise typer.Exit(1) from None
    found = describe(config)
    if as_json:
        typer.echo(orjson.dumps({"ok": True, **found}, option=orjson.OPT_INDENT_2).decode())
    else:
        _print(config_path, found)


def describe(config: Config) -> dict[str, Any]:
    """What the configuration comes to, as plain values without secrets."""
    pools = [*config.enabled_pools().values(), *config.enabled_providers().values()]
    catalog = CatalogBuilder(config, Upstreams().pools(pools), PriceBook(), 0).catalog()
    now_time = time.time()
    models = []
    for name, model in config.models.items():
        served = catalog.find(name)
        prices = iter(served.targets if served is not None else ())
        targets = []
        for target in model.targets:
            off = config.target_off_because(target)
            price = None if off else next(prices).price
            targets.append(
                {
                    "at": target.upstream,
                    "model": target.model or name,
                    "price": price and price.kind,
                    "usd_per_million_tokens": price and usd_per_million_tokens(price, now_time),
                    "off": off,
                }
            )
        models.append({"name": name, "aliases": model.aliases, "targets": targets})
    keys = config.declared_keys()
    return {
        "build": build_name(),
        "listeners": {
            "data_plane": f"{config.server.host}:{config.server.port}",
            "management": f"{config.management.host}:{config.management.port}",
        },
        "workers": config.server.workers,
        "models": models,
        "providers": sorted(config.enabled_providers()),
        "pools": sorted(config.enabled_pools()),
        "keys": {kind: [key.name for key in keys if key.kind == kind] for kind in ("caller", "operator")},
        "unknown_prices": config.prices.unknown,
        "rules": [rule.name for rule in config.rules],
        "notes": [*config.notes(), *routing_notes(config, catalog)],
    }


def _print_errors(error: ConfigError) -> None:
    console = Console(stderr=True)
    for line in error.lines:
        console.print(escape(line), highlight=False, soft_wrap=True)
    problems = "1 problem" if len(error.lines) == 1 else f"{len(error.lines)} problems"
    console.print(f"[bold red]{problems}[/] in {escape(str(error.path))}", highlight=False)


def _print(path: Path, found: dict[str, Any]) -> None:
    console = Console()
    rows = [
        (
            "" if number else ", ".join((model["name"], *model["aliases"])),
            target["at"],
            target["model"],
            f"off ({target['off']})"
            if target["off"]
            else price_text(target["price"], target["usd_per_million_tokens"]),
        )
        for model in found["models"]
        for number, target in enumerate(model["targets"])
    ]
    print_table(_COLUMNS, rows)
    print()
    keys, listeners = found["keys"], found["listeners"]
    shown = {
        "providers": ", ".join(found["providers"]) or "none: no key in the environment",
        "pools": ", ".join(found["pools"]) or "none",
        "rules": ", ".join(found["rules"]) or "none: requests go where they ask",
        "keys declared": f"{len(keys['caller'])} for callers, {len(keys['operator'])} for operators",
        "data plane": f"{listeners['data_plane']}, workers: {found['workers']}",
        "management": listeners["management"],
        "unknown prices": found["unknown_prices"],
        "build": found["build"],
    }
    for name, value in shown.items():
        console.print(f"[bold]{name:<15}[/] {escape(value)}", highlight=False, soft_wrap=True)
    for note in found["notes"]:
        console.print(f"[yellow]note[/]            {escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"[bold green]OK[/] {escape(str(path))}", highlight=False)
