"""The product's source files, parsed once, for the tests of the architecture."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "policies", "backends", "local_engine")  # the arrow of imports, from left to right


class Source(NamedTuple):
    """`name` is the path from the root."""

    path: Path
    name: str
    text: str
    tree: ast.Module

    @property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


@cache
def sources() -> tuple[Source, ...]:
    paths = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    texts = [path.read_text() for path in paths]
    return tuple(
        Source(path, str(path.relative_to(ROOT)), text, ast.parse(text))
        for path, text in zip(paths, texts, strict=True)
    )
