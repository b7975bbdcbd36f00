"""A path in the configuration file: what is relative counts from the file's own directory."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo


def _anchor(path: Path, info: ValidationInfo) -> Path:
    directory: Path = (info.context or {}).get("directory", Path())
    return directory / path


def _not_blank(value: Any) -> Any:
    if value == "":
        raise ValueError("must not be empty")  # it would mean the file's own directory
    return value


LocalPath = Annotated[Path, BeforeValidator(_not_blank), AfterValidator(_anchor)]
