"""What the commands share that work on the storage: where it is, opening it, failing in a sentence.

The configuration says where; only its `storage` section is read, so that a variable which is set for the service
alone does not keep anybody from looking at costs.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, NamedTuple, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from gateway.config import DEFAULT_PATH, ConfigError, load_storage
from gateway.keys import load_pepper
from gateway.stores.sqlite import DATABASE_NAME, Connection, StorageError, database

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        "-c",
        envvar="HEADGATE_CONFIG",
        show_default=str(DEFAULT_PATH),
        help="The configuration file: its storage section says where everything is.",
    ),
]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", envvar="HEADGATE_DATA", help="The storage directory instead."),
]
_PEPPER_VARIABLE: Final = "HEADGATE_PEPPER"


class Storage(NamedTuple):
    """`pepper` None: the file in the directory has it."""

    directory: Path
    pepper: str | None = None

    def __repr__(self) -> str:
        return f"Storage({str(self.directory)!r})"


def fail(message: str) -> NoReturn:
    """Says why on standard error and ends the command."""
    console = Console(stderr=True)
    console.print(f"[bold red]Error:[/] {escape(message)}", highlight=False, soft_wrap=True)
    raise typer.Exit(1)


def find_storage(config: Path | None, data: Path | None) -> Storage:
    """Where the configuration says. A directory that is named wins; it brings no configuration with it."""
    if data is not None and config is None:
        return Storage(data, os.environ.get(_PEPPER_VARIABLE) or None)
    if config is None and not DEFAULT_PATH.exists():
        fail(f"There is no {DEFAULT_PATH} here: name it with --config, or the storage directory with --data.")
    try:
        settings = load_storage(config or DEFAULT_PATH, os.environ)
    except ConfigError as error:
        fail(str(error))
    pepper = None if settings.pepper is None else settings.pepper.get_secret_value()
    return Storage(data or settings.directory, pepper)


@contextmanager
def opened(storage: Storage, *, may_write: bool) -> Iterator[Connection]:
    """The database, beside a running gateway or a stopped one; its errors end the command with a sentence."""
    try:
        with database(storage.directory / DATABASE_NAME, may_write=may_write) as connection:
            yield connection
    except StorageError as error:
        fail(str(error))


def pepper_of(storage: Storage) -> bytes:
    """Made on first use."""
    try:
        return load_pepper(storage.directory, storage.pepper)
    except StorageError as error:
        fail(str(error))
