"""The data plane as commands use it, with a caller's key: JSON answers, files up and down as streams.

The key is best read from the environment, so that it is neither in a process list nor in a shell's history. What goes
wrong ends the command with a sentence.
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

_TIMEOUT_S: Final = 120.0
_PIECE_BYTES: Final = 256 * 1024

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
ServiceOption = Annotated[
    Path, typer.Option("--config", "-c", envvar="HEADGATE_CONFIG", help="The configuration file.")
]


class DataPlane(NamedTuple):
    """Of one running service, as one caller."""

    url: str
    key: str

    def ask(self, path: str, method: str = "GET", body: dict[str, Any] | None = None) -> Any:
        """Its JSON answer."""
        data = None if body is None else json.dumps(body).encode()
        with self._opened(path, method, data, {"content-type": "application/json"}) as answer:
            return json.loads(answer.read())

    def send_form(self, path: str, content_type: str, pieces: Iterable[bytes], size_bytes: int) -> Any:
        """Its JSON answer to a form that is read while it is sent."""
        headers = {"content-type": content_type, "content-length": str(size_bytes)}
        with self._opened(path, "POST", pieces, headers) as answer:
            return json.loads(answer.read())

    def pieces(self, path: str) -> Iterator[bytes]:
        """What is at this path, as it comes."""
        with self._opened(path, "GET", None, {}) as answer:
            while piece := answer.read(_PIECE_BYTES):
                yield piece

    @contextmanager
    def _opened(
        self, path: str, method: str, data: bytes | Iterable[bytes] | None, headers: dict[str, str]
    ) -> Iterator[http.client.HTTPResponse]:
        if not self.url.startswith(("http://", "https://")):
            fail("--url must begin with http:// or https://.")
        if not self.key:
            fail("A caller's key is needed: set HEADGATE_API_KEY (`headgate keys create` makes one).")
        headers = {**headers, "authorization": f"Bearer {self.key}"}
        url = self.url.rstrip("/").removesuffix("/v1") + path
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 - checked above
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - checked above
                yield answer
        except urllib.error.HTTPError as error:
            with error:
                fail(_reason(error))
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            fail(
                f"Nothing that speaks for Headgate answers at {self.url} ({reason}). --url says where it is."
            )

    def __repr__(self) -> str:
        return f"DataPlane({self.url!r})"


def find_data_plane(url: str, key: str, config: Path = DEFAULT_PATH) -> DataPlane:
    """The one that is named, else where the configuration has it."""
    return DataPlane(url or _configured(config), key)


def _configured(path: Path) -> str:
    try:
        server = load(path, os.environ).server
    except ConfigError as error:
        fail(str(error))
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)  # noqa: S104 - looked for, not bound
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["error"]["message"])
    except (ValueError, KeyError, TypeError, OSError):
        return f"The gateway answered with status {error.code}."
