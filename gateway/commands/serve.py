"""`headgate serve`: the service, in the foreground, until a signal."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
import uvloop

from gateway.config import DEFAULT_PATH, load
from gateway.config_file import ConfigError
from gateway.server import Overrides, ServeError, Server


def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
    ] = DEFAULT_PATH,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of server.port; 0: any free one.")
    ] = None,
    management_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Instead of management.port.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=1024, help="Instead of server.workers.")] = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C. SIGHUP reloads the configuration, SIGUSR2 replaces the workers."""
    try:
        loaded = load(config, os.environ)
        code = uvloop.run(Server(config, os.environ, loaded, Overrides(port, management_port, workers)).run())
    except ConfigError as error:
        for line in error.lines:
            print(line, file=sys.stderr)
        raise typer.Exit(1) from None
    except ServeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(code)
