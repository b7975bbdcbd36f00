"""The entry point: `headgate ...`, the same as `python -m gateway ...`. The commands are in gateway/commands/app.py."""

import signal
from importlib import import_module


def main() -> None:
    """Runs the command line. Loading it takes half a second, in which Ctrl-C ends the process without a trace."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    app = import_module("gateway.commands.app").app
    signal.signal(signal.SIGINT, signal.default_int_handler)
    app()


if __name__ == "__main__":
    main()
