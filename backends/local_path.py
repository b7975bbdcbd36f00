"""A path in the configuration file: what is relative counts from the file's own directory."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo


def _anchor(path: Path, info: ValidationInfo) -> Path:
    directory: Path = (info.context or {}).get("directory", Path())
    return directory / path


LocalPath = Annotated[Path, AfterValidator(_anchor)]
