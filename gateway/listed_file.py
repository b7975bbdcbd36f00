"""Endpoints in a file that somebody else writes: one URL a line, or YAML or JSON with what is known of each."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from backends.discovery.config import DiscoveryConfig, FileSource
from backends.discovery.found import MOST, DiscoveryError, Found
from backends.member import Role
from backends.origin import Origin
from local_engine.config import Section

_MOST_BYTES: Final = 4 << 20


class _Entry(Section):
    url: str
    name: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$")
    role: Role | None = None
    weight: float = Field(default=1.0, gt=0)
    ranks: int = Field(default=1, ge=1, le=1024)
    is_open: bool = True


_ENTRIES: Final = TypeAdapter(Annotated[list[_Entry | str], Field(max_length=MOST)])


class FileFinder:
    """Looks again and again; what has not changed is not read twice."""

    def __init__(self, settings: DiscoveryConfig, source: FileSource) -> None:
        self._settings = settings
        self._path = source.path

    async def follow(self) -> AsyncIterator[tuple[Found, ...]]:
        """All that there are, each time the file has changed."""
        known: bytes | None = None
        while True:
            content = await asyncio.to_thread(_read, self._path)
            if content != known:
                yield entries(content, self._settings)
                known = content
            await asyncio.sleep(self._settings.every_s)


def entries(content: bytes, settings: DiscoveryConfig) -> tuple[Found, ...]:
    """DiscoveryError with the place that is wrong."""
    found = []
    for number, entry in enumerate(_parsed(content), 1):
        told = _Entry(url=entry) if isinstance(entry, str) else entry
        url = told.url.rstrip("/")
        try:
            Origin.parse(url)
        except ValueError as error:
            raise DiscoveryError(f"entry {number} of the file: {error}") from error
        found.append(
            Found(
                told.name or url,
                url,
                told.role or settings.role,
                told.weight,
                told.ranks,
                told.is_open,
                told.name,
            )
        )
    keys = [each.key for each in found]
    if len(set(keys)) != len(keys):
        raise DiscoveryError("the file has an entry twice")
    return tuple(found)


def _parsed(content: bytes) -> list[_Entry | str]:
    try:
        text = content.decode()
        lines = [line.strip() for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
        if all("://" in line and " " not in line and line[0] not in "-[{" for line in lines):
            return list(lines)
        values: Any = yaml.safe_load(text)
        if isinstance(values, dict) and set(values) == {"endpoints"}:
            values = values["endpoints"]
        return _ENTRIES.validate_python(values)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DiscoveryError("the file is neither a list of URLs nor YAML nor JSON") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DiscoveryError(f"the file's list, at {place or 'its top'}: {first['msg']}") from error


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError as error:
        raise DiscoveryError(f"the file cannot be read ({error.strerror})") from error
