"""Asking the running service on its management plane: where it is, whose key, one question and its answer.

Knows of the service only where the plane is. The operator key is read from the environment, so that it
is neither in a process list nor in a shell's history.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

from gateway.commands.storage import fail
from gateway.config import DEFAULT_PATH, ConfigError, load

UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="HEADGATE_MANAGEMENT_URL",
        help="Where the management plane is; default: where the configuration has it.",
    ),
]
KeyOption = Annotated[
    str, typer.Option(envvar="HEADGATE_OPERATOR_KEY", help="An operator key; better set the variable.")
]
ConfigOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
DEFAULT_CONFIG: Final = DEFAULT_PATH
_TIMEOUT_S: Final = 10.0


class Plane(NamedTuple):
    """Where it is and how to get in. `url` empty: where the configuration has it."""

    url: str
    key: str
    config_path: Path

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET, or POST if there is a body. Ends the command with a sentence when it is not answered."""
        url = self.url or _configured(self.config_path)
        if not url.startswith(("http://", "https://")):
            fail("--url must begin with http:// or https://.")
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{url.rstrip('/')}{path}", data, headers)  # noqa: S310 - checked above
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
        if not isinstance(told, dict):
            fail(f"What answers at {url} is not a management plane of Headgate.")
        return told


def _configured(path: Path) -> str:
    try:
        plane = load(path, os.environ).management
    except ConfigError as error:
        fail(str(error))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(plane.host, plane.host)  # noqa: S104 - looked for, not bound
    return f"http://[{host}]:{plane.port}" if ":" in host else f"http://{host}:{plane.port}"


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"The management plane answered with status {error.code}."
