"""`headgate webhooks`: who hears when batches, responses and jobs have ended, tried out and told again.

Asks the running service. A secret is shown by the command that made it, and by `show`.
"""

import json
from typing import Annotated, Any, Final
from urllib.parse import quote

import typer
from rich.console import Console

from gateway.commands.plane import OperatorOption, ServiceOption, UrlOption, find_plane
from gateway.commands.storage import fail
from gateway.commands.tables import Column, print_table
from gateway.config import DEFAULT_PATH

app = typer.Typer(help="Webhooks of the queue.", no_args_is_help=True)

_ENDPOINTS: Final = (
    Column("id"),
    Column("tenant", folds=True),
    Column("url", folds=True),
    Column("events", folds=True, rank=2),
    Column("source", rank=3),
    Column("state", folds=True),
)
_MESSAGES: Final = (
    Column("id"),
    Column("subject"),
    Column("told"),
    Column("to", folds=True),
    Column("state"),
    Column("attempts", is_number=True, rank=2),
    Column("created", rank=3),
    Column("next", rank=4),
    Column("error", folds=True, rank=1),
)

JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
EndpointArgument = Annotated[str, typer.Argument(metavar="WEBHOOK", help="Its id, we_...")]
EndpointOrTenant = Annotated[
    str,
    typer.Argument(
        metavar="WEBHOOK", help="Its id, we_...; or a tenant's name: what signs for the URLs in its requests."
    ),
]


@app.command("list")
def list_webhooks(
    tenant: Annotated[str, typer.Option(help="Only this one's.")] = "",
    as_json: JsonOption = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """All receivers, from the configuration and the database, without their secrets."""
    found = find_plane(url, key, config).ask("/api/webhooks")
    found = [each for each in found if tenant in ("", each["tenant"])]
    if as_json:
        print(json.dumps(found))
        return
    print_table(_ENDPOINTS, [[_cell(each[column.title]) for column in _ENDPOINTS] for each in found])


@app.command()
def create(
    tenant: Annotated[str, typer.Argument(help="Whose jobs: an organisation, a team, or a key's id.")],
    to: Annotated[str, typer.Argument(metavar="URL", help="https://...")],
    event: Annotated[
        list[str] | None, typer.Option(help="As batch.completed or response.*; repeat. Default: all.")
    ] = None,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Make a receiver, and print the secret that its webhooks are signed with."""
    wanted = {"tenant": tenant, "url": to, "events": event or []}
    _say(find_plane(url, key, config).ask("/api/webhooks", "POST", wanted))


@app.command()
def show(
    webhook: EndpointOrTenant,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """One receiver, with its secret."""
    _say(find_plane(url, key, config).ask(f"/api/webhooks/{_part(webhook)}"))


@app.command()
def rotate(
    webhook: EndpointOrTenant,
    grace: Annotated[str, typer.Option(help="How long the old secret signs as well: 24h, 7d or 0h.")] = "24h",
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Give it a new secret."""
    path = f"/api/webhooks/{_part(webhook)}/rotate"
    _say(find_plane(url, key, config).ask(path, "POST", {"grace": grace}))


@app.command()
def enable(
    webhook: EndpointArgument,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Tell it again, after it had said that it was gone (410)."""
    _say(find_plane(url, key, config).ask(f"/api/webhooks/{_part(webhook)}/enable", "POST"))


@app.command()
def remove(
    webhook: EndpointArgument,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Tell it nothing more."""
    _say(find_plane(url, key, config).ask(f"/api/webhooks/{_part(webhook)}", "DELETE"))


@app.command("test")
def try_out(
    webhook: EndpointArgument,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Send it a signed `webhook.test` now, and say what it answered."""
    outcome = find_plane(url, key, config).ask(f"/api/webhooks/{_part(webhook)}/test", "POST")
    told = f"status {outcome['status']}" if outcome["status"] else outcome["error"]
    if not outcome["is_delivered"]:
        fail(f"It was not delivered: {told}.")
    print(f"Delivered: {told}.")


@app.command()
def messages(
    subject: Annotated[str, typer.Argument(help="Only of this job, batch or response.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="The newest so many.")] = 100,
    as_json: JsonOption = False,
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """What was told or waits to be, newest first."""
    found = find_plane(url, key, config).ask(f"/api/webhooks/messages?subject={_part(subject)}&limit={limit}")
    if as_json:
        print(json.dumps(found))
        return
    print_table(_MESSAGES, [[_cell(each[column.title]) for column in _MESSAGES] for each in found])


@app.command()
def replay(
    message: Annotated[list[str], typer.Argument(metavar="MESSAGE...", help="Their ids, msg_...")],
    url: UrlOption = "",
    key: OperatorOption = "",
    config: ServiceOption = DEFAULT_PATH,
) -> None:
    """Tell messages again under their ids, delivered, given up or waiting."""
    plane = find_plane(url, key, config)
    for each in message:
        plane.ask(f"/api/webhooks/messages/{_part(each)}/replay", "POST")
        print(f"{each} is told again.")


def _part(name: str) -> str:
    """Of a URL."""
    return quote(name, safe="")


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "" if value is None else str(value)


def _say(endpoint: dict[str, Any]) -> None:
    console = Console()
    for name, value in endpoint.items():
        if value not in ("", []):
            console.print(f"{name:8}  {_cell(value)}", highlight=False, markup=False, soft_wrap=True)
