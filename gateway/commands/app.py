"""The command line as a whole: every command by its name."""

from importlib import metadata

import typer

from gateway.commands import batch, costs, engine, jobs, keys, ledger, limits, teams, webhooks
from gateway.commands.check import check
from gateway.commands.explain import explain
from gateway.commands.serve import serve
from gateway.commands.status import status
from gateway.compiled import build_name

app = typer.Typer(
    name="headgate",
    help="A self-hosted AI gateway: one base URL, every token priced.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # its frames show local variables, and those hold keys
)
app.command()(serve)
app.command()(check)
app.command()(explain)
app.command()(status)
app.add_typer(keys.app, name="keys")
app.add_typer(teams.app, name="teams")
app.add_typer(limits.app, name="limits")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(batch.app, name="batch")
app.add_typer(jobs.app, name="jobs")
app.add_typer(costs.app, name="costs")
app.add_typer(ledger.app, name="ledger")
app.add_typer(engine.app, name="engine")


@app.command()
def version() -> None:
    """The version of Headgate, and whether its request path is compiled."""
    print(f"{metadata.version('headgate')} ({build_name()})")
