"""Bodies at rest: what requests, answers and files look like where they are stored.

Owns the form: one byte that says how the rest is written, so that what was stored plainly is still read after a key was
set, and the other way round. Refuses to know where it is stored. Large ones are compressed; with a key of the operator's
all are sealed, each for its own place: a row moved to another job does not open. Nothing here is in a log or a message.
"""

import base64
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Protocol, cast

from pydantic import AfterValidator, Field, SecretStr, model_validator

from backends.config import BlankIsNone
from backends.local_path import LocalPath
from gateway.stores.sqlite import StorageError
from local_engine.config import RESTART, Secret, Section

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_PLAIN: Final = b"\x00"
_COMPRESSED: Final = b"\x01"
_SEALED: Final = b"\x02"
_COMPRESS_FROM_BYTES: Final = 512
_LEVEL: Final = 1


class BodyError(StorageError):
    """A stored body cannot be read; the message says what to change."""


class Seal(Protocol):
    """Makes bytes unreadable, and readable again for whoever has the key."""

    def seal(self, body: bytes, place: bytes) -> bytes: ...

    def unseal(self, sealed: bytes, place: bytes) -> bytes: ...


class Bodies:
    """One per process. Without a seal bodies are stored as they are, and sealed ones refused."""

    def __init__(self, seal: Seal | None = None) -> None:
        self._seal = seal

    @property
    def are_sealed(self) -> bool:
        return self._seal is not None

    def write(self, body: bytes, place: str) -> bytes:
        """What is to be stored at this place: the id of its job, file or answer, and which of its parts."""
        written = _PLAIN + body
        if len(body) >= _COMPRESS_FROM_BYTES:
            packed = zstd.compress(body, level=_LEVEL)
            if len(packed) < len(body):
                written = _COMPRESSED + packed
        return written if self._seal is None else _SEALED + self._seal.seal(written, place.encode())

    def read(self, stored: bytes, place: str) -> bytes:
        """What `write` was given. BodyError when it is not whole, or its key is not here."""
        form, rest = stored[:1], stored[1:]
        if form == _SEALED:
            if self._seal is None:
                raise BodyError(
                    "A stored body is encrypted: set `queue.encryption` to the key it was written with."
                )
            opened = self._seal.unseal(rest, place.encode())
            form, rest = opened[:1], opened[1:]
        if form == _COMPRESSED:
            try:
                return zstd.decompress(rest)
            except zstd.ZstdError:
                raise BodyError("A stored body is damaged: restore a backup.") from None
        if form != _PLAIN:
            raise BodyError("A stored body is damaged, or was written by a newer Headgate.")
        return rest


def read_key(text: str) -> bytes:
    """32 bytes from their base64. ValueError with a sentence that does not repeat it."""
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ValueError("a key is the base64 of 32 random bytes (openssl rand -base64 32)")
    return key


def _is_key(secret: SecretStr) -> SecretStr:
    if secret.get_secret_value():
        read_key(secret.get_secret_value())
    return secret


class EncryptionConfig(Section):
    """Encryption of what the queue stores: requests, answers, files. AES-256-GCM; without a key it is stored as it is,
    readable by the owner of the data folder alone. Needs `pip install 'headgate[encryption]'`."""

    keys: tuple[Annotated[Secret, AfterValidator(_is_key)], ...] = Field(
        default=(), max_length=16, json_schema_extra=RESTART
    )
    """Base64 of 32 random bytes each, from the environment. The first one writes, every one reads: put a new one in
    front, and drop the old one when `queue.result_s` has passed."""
    key_file: Annotated[LocalPath | None, BlankIsNone] = Field(default=None, json_schema_extra=RESTART)
    """The same, from a file with a key on each line. Either this or `keys`."""

    @model_validator(mode="after")
    def _has_one_source(self) -> "EncryptionConfig":
        if self.key_file is not None and any(key.get_secret_value() for key in self.keys):
            raise ValueError("needs either keys or key_file")
        return self

    def read_keys(self) -> list[bytes]:
        """The one that writes first. StorageError when the file cannot be read."""
        if self.key_file is None:
            return [read_key(text) for key in self.keys if (text := key.get_secret_value())]
        return _keys_in(self.key_file)


def _keys_in(path: Path) -> list[bytes]:
    try:
        if path.stat().st_mode & 0o077:
            raise StorageError(f"The key file {path} may be read by others: chmod 600 it.")
        keys = [read_key(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise StorageError(f"Cannot read the key file {path}: {error.strerror}.") from error
    except ValueError as error:
        raise StorageError(f"The key file {path} cannot be used: {error}.") from None
    if not keys:
        raise StorageError(f"The key file {path} is empty.")
    return keys


def open_bodies(settings: EncryptionConfig) -> Bodies:
    """As the configuration says. StorageError when it cannot be done."""
    keys: Sequence[bytes] = settings.read_keys()
    if not keys:
        return Bodies()
    try:
        # By name at run time: the library is an extra that nothing else needs.
        sealing = importlib.import_module("gateway.overflow.sealing")
    except ModuleNotFoundError as error:
        raise StorageError(
            "`queue.encryption` needs cryptography: pip install 'headgate[encryption]'."
        ) from error
    return Bodies(cast("Seal", sealing.AesSeal(keys)))
