"""What the configuration says of Redis: `storage.redis`, for limits and a ledger shared by several nodes.

Refuses to know redis-py: a gateway without this section never loads it. The URL may hold a password, so nothing here
repeats it.
"""

import re
import secrets
import socket
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr

from backends.config import BlankIsNone, CaFile
from gateway.stores.sqlite import StorageError, prepare_directory
from local_engine.config import Secret, Section

_SCHEMES: Final = ("redis", "rediss", "unix")
_NODE: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_NODE_FILE: Final = "node"


def _url(value: SecretStr) -> SecretStr:
    try:
        parts = urlsplit(value.get_secret_value())
        is_whole = parts.scheme in _SCHEMES and (parts.path if parts.scheme == "unix" else parts.hostname)
        _ = parts.port
    except ValueError:
        is_whole = None
    if not is_whole:
        raise ValueError(
            "must be redis://[user:password@]host[:port][/database], rediss://... or unix:///path"
        )
    return value


def _plain(value: str) -> str:
    if not _NODE.fullmatch(value):
        raise ValueError("has letters, digits and . _ -, up to 64")
    return value


Plain = Annotated[str, AfterValidator(_plain)]


class RedisConfig(Section):
    """Redis (6.2 or newer) or Valkey, for several nodes: limits are counted there, and ledger rows pass through it."""

    url: Annotated[Secret, AfterValidator(_url)]
    """`redis://[user:password@]host:port/0`, `rediss://...` for TLS, `unix:///path`. From the environment."""
    ca_file: Annotated[CaFile | None, BlankIsNone] = None
    """PEM file of authorities to trust for `rediss`, instead of the system's."""
    prefix: Plain = "headgate"
    """What all keys begin with. Nodes with the same one share limits and ledger."""
    node: Annotated[Plain | None, BlankIsNone] = None
    """This node's name in the ledger, unlike any other's; null: the host's, and something made at the first start."""
    timeout_ms: int = Field(default=100, ge=5, le=5000)
    """How long a call may take before Redis counts as away."""
    collects: bool = True
    """Whether this node's database gets the ledger rows of the other nodes, for reports on all of them."""


def node_name(storage: Path, config: RedisConfig) -> str:
    """This node's name, the same at every start. StorageError when it cannot be kept."""
    if config.node is not None:
        return config.node
    path = storage / _NODE_FILE
    try:
        return path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise StorageError(f"Cannot read the node's name in {path}: set `storage.redis.node`.") from error
    host = re.sub(r"[^A-Za-z0-9._-]", "", socket.gethostname())[:48] or "node"
    name = f"{host}-{secrets.token_hex(3)}"
    prepare_directory(storage)
    try:
        with path.open("x", encoding="ascii") as file:
            file.write(name + "\n")
    except FileExistsError:
        return path.read_text(encoding="ascii").strip()
    except OSError as error:
        raise StorageError(f"Cannot write the node's name to {path}: {error.strerror}.") from error
    return name
