"""Versions below which a dependency is known to be unsafe; asserted at start-up, with the reason.

Owns the list and the sentences. An installer may choose less than what the project's own metadata asks for
(a pure wheel without the C parser, a system package); this is what stands in its way.
"""

import re
import sys
from importlib import metadata
from typing import Final

import aiohttp
from aiohttp import http_parser

from gateway.stores.sqlite import StorageError, check_version

PYTHON: Final = (3, 11)
AIOHTTP: Final = (3, 14, 5)
UVLOOP: Final = (0, 23, 0)


def problems() -> list[str]:
    """What is too old here, as sentences; empty when all is well."""
    found = []
    if sys.version_info < PYTHON:
        found.append(f"Python {_text(sys.version_info[:3])} is too old: {_text(PYTHON)} or newer is needed.")
    if _parsed(aiohttp.__version__) < AIOHTTP:
        found.append(
            f"aiohttp {aiohttp.__version__} has known request smuggling and memory errors: "
            f"install {_text(AIOHTTP)} or newer."
        )
    if http_parser.HttpRequestParser.__module__ != "aiohttp._http_parser":
        found.append(
            "aiohttp runs without its C parser (a pure Python wheel, or AIOHTTP_NO_EXTENSIONS is set): "
            "install the binary wheel of your platform."
        )
    uvloop = metadata.version("uvloop")
    if _parsed(uvloop) < UVLOOP:
        found.append(
            f"uvloop {uvloop} can mix up connections when one is cancelled: install {_text(UVLOOP)} or newer."
        )
    try:
        check_version()
    except StorageError as error:
        found.append(str(error))
    return found


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
