"""`headgate engine`: the vLLM that Headgate runs."""

import typer

from gateway.commands.engine_plan import plan, presets

app = typer.Typer(help="Engines: vLLM that Headgate starts and looks after.", no_args_is_help=True)
app.command()(plan)
app.command()(presets)
