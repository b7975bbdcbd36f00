"""`headgate engine`: the vLLM that Headgate runs."""

import typer

from gateway.commands import engine_control
from gateway.commands.engine_plan import plan, presets
from gateway.commands.engine_run import run
from gateway.commands.engine_top import top

app = typer.Typer(help="Engines: vLLM that Headgate starts and looks after.", no_args_is_help=True)
app.command()(plan)
app.command()(presets)
app.command()(run)
app.command()(top)
for command in (
    engine_control.status,
    engine_control.restart,
    engine_control.scale,
    engine_control.drain,
    engine_control.resume,
    engine_control.sleep,
    engine_control.wake,
):
    app.command()(command)
