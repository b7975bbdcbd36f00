"""What setup.py compiles: modules that are there, by the compiler that is locked, and nothing that compiling would change."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.support.sources import sources

ROOT = Path(__file__).parents[2]
SETUP = ast.parse((ROOT / "setup.py").read_text())


def constant(name: str) -> object:
    for node in SETUP.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py sets no {name}")


def decoded_names(tree: ast.AST) -> Iterator[str]:
    """Names in what msgspec is told to decode: `Decoder(X)`, `decode(data, type=X)`, `convert(data, X)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and re.search(r"Decoder$|decode$|convert$", ast.unparse(node.func)):
            kinds = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "type")]
            for kind in kinds:
                yield from (name.id for name in ast.walk(kind) if isinstance(name, ast.Name))


def test_every_module_on_the_list_is_there_once() -> None:
    listed = constant("COMPILED")
    assert isinstance(listed, tuple)
    assert len(set(listed)) == len(listed)
    assert set(listed) <= {source.name for source in sources()}


def test_the_compiler_is_the_one_that_is_locked() -> None:
    assert constant("MYPY") in (ROOT / "requirements-dev.lock").read_text().splitlines()


def test_what_is_decoded_into_keeps_its_annotations() -> None:
    """mypyc leaves of `int | None` no more than that it is some type: msgspec would refuse every value."""
    decoded = {name for source in sources() for name in decoded_names(source.tree)}
    listed = constant("COMPILED")
    assert isinstance(listed, tuple)
    for source in sources():
        for node in ast.walk(source.tree):
            if source.name in listed and isinstance(node, ast.ClassDef) and node.name in decoded:
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        plain = isinstance(field.annotation, ast.Name | ast.Attribute)
                        assert plain, f"{source.name}:{field.lineno} belongs in a module that is not compiled"


def test_structs_in_compiled_modules_say_nothing_that_compiling_drops() -> None:
    """mypyc drops a class's keywords: a frozen struct is no longer hashed, `eq`, `rename`, `array_like` are without effect."""
    listed = constant("COMPILED")
    assert isinstance(listed, tuple)
    for source in sources():
        for node in ast.walk(source.tree):
            if source.name in listed and isinstance(node, ast.ClassDef):
                dropped = {keyword.arg for keyword in node.keywords} - {"frozen"}
                assert not dropped, f"{source.name}:{node.lineno} belongs in a module that is not compiled"
