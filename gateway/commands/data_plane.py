"""The data plane as commands use it, with a caller's key: as `gateway.commands.plane` asks the other one, and files."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from gateway.commands.plane import Plane, address
from gateway.commands.storage import fail
from gateway.config import DEFAULT_PATH, ConfigError, load

_PIECE_BYTES: Final = 256 * 1024
_NEEDS: Final = "A caller's key is needed: set HEADGATE_API_KEY (`headgate keys create` makes one)."

UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="HEADGATE_URL",
        help="Where the data plane is, without /v1; default: where the configuration has it.",
    ),
]
KeyOption = Annotated[
    str, typer.Option("--key", envvar="HEADGATE_API_KEY", help="A caller's key; better set the variable.")
]


def find_data_plane(url: str, key: str, config: Path = DEFAULT_PATH) -> Plane:
    """The one that is named, else where the configuration has it."""
    return Plane((url or _configured(config)).rstrip("/").removesuffix("/v1"), key, _NEEDS)


def send_form(plane: Plane, path: str, content_type: str, pieces: Iterable[bytes], size_bytes: int) -> Any:
    """The JSON answer to a form that is read while it is sent."""
    headers = {"content-type": content_type, "content-length": str(size_bytes)}
    with plane.opened(path, "POST", pieces, headers) as answer:
        return json.loads(answer.read())


def pieces_of(plane: Plane, path: str) -> Iterator[bytes]:
    """What is at this path, as it comes."""
    with plane.opened(path, "GET", None, {}) as answer:
        while piece := answer.read(_PIECE_BYTES):
            yield piece


def _configured(path: Path) -> str:
    try:
        server = load(path, os.environ).server
    except ConfigError as error:
        fail(str(error))
    return address(server.host, server.port)
