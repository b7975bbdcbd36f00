"""A plane of the running service as commands ask it: where it is, and its answer or a sentence on why there is none.

Knows of the service only where the plane is. The operator key is best read from the environment, so that it is neither in
a process list nor in a shell's history.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

from gateway.commands.storage import fail
from gateway.config import DEFAULT_PATH, ConfigError, load

_TIMEOUT_S: Final = 60.0
_NEEDS: Final = (
    "An operator key is needed: set HEADGATE_OPERATOR_KEY (the first start printed one; "
    "`headgate keys create NAME --operator` makes another)."
)

UrlOption = Annotated[
    str,
    typer.Option(
        "--url",
        envvar="HEADGATE_MANAGEMENT_URL",
        help="Where the management plane is; default: where the configuration has it.",
    ),
]
OperatorOption = Annotated[
    str,
    typer.Option("--key", envvar="HEADGATE_OPERATOR_KEY", help="An operator key; better set the variable."),
]
ServiceOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


class Plane(NamedTuple):
    """One plane of a running service, as whoever has this key. `needs` says which that is, where there must be one."""

    url: str
    key: str
    needs: str = ""

    def ask(self, path: str, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        """Its JSON answer. Ends the command with a sentence when there is none, or a refusal."""
        data = None if body is None else json.dumps(body).encode()
        with self.opened(path, method, data, {"content-type": "application/json"}) as answer:
            return json.loads(answer.read())

    @contextmanager
    def opened(
        self, path: str, method: str, data: bytes | Iterable[bytes] | None, headers: dict[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        """Its answer, to be read. Ends the command as `ask` does, while it is read as well."""
        if not self.url.startswith(("http://", "https://")):
            fail("--url must begin with http:// or https://.")
        if self.needs and not self.key:
            fail(self.needs)
        if self.key:
            headers = {**headers, "authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(self.url.rstrip("/") + path, data, headers, method=method)  # noqa: S310 - checked above
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - checked above
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                fail(_reason(error))
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            fail(
                f"Nothing that speaks for Headgate answers at {self.url} ({reason}). Is it running? --url says where."
            )

    def __repr__(self) -> str:
        return f"Plane({self.url!r})"


def find_plane(url: str, key: str, config: Path = DEFAULT_PATH) -> Plane:
    """The one that is named, else where the configuration has it."""
    return Plane(url or _configured(config), key, _NEEDS)


def _configured(path: Path) -> str:
    try:
        plane = load(path, os.environ).management
    except ConfigError as error:
        fail(str(error))
    return address(plane.host, plane.port)


def address(host: str, port: int) -> str:
    """Where something that listens there is reached from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - looked for, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"The service answered with status {error.code}."
