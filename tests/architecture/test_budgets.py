"""Caps on the tails: a file, a function and a signature one is not afraid to open."""

import ast
import re

from tests.support.sources import PACKAGES, sources

FILE_LINES, FUNCTION_LINES, PARAMETERS = 500, 60, 7
BANNED_NAMES = {"utils", "util", "common", "helpers", "helper", "types", "base", "misc", "shared"}
BANNED_WORDS = re.compile(r"(Manager|Helper|Util|Impl|Info|Data|Abstract)$")
# An exception is a line with its reason; the list may only shrink.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS: dict[str, str] = {
    "gateway/commands/costs.py:costs": "each is an option of the command line",
    "gateway/commands/explain.py:explain": "each is an option of the command line",
    "gateway/commands/keys.py:create": "each is an option of the command line",
    "gateway/commands/limits.py:set_one": "each is an option of the command line",
}


def test_files_stay_short() -> None:
    lengths = {source.name: len(source.text.splitlines()) for source in sources()}
    long = {name: lines for name, lines in lengths.items() if lines > FILE_LINES}
    assert long.keys() == LONG_FILES.keys(), f"the cap is {FILE_LINES} lines: {long}"


def test_functions_fit_a_screen() -> None:
    long = {
        f"{source.name}:{function.name}": lines
        for source in sources()
        for function in source.functions
        if (lines := (function.end_lineno or function.lineno) - function.lineno + 1) > FUNCTION_LINES
    }
    assert long.keys() == LONG_FUNCTIONS.keys(), f"the cap is {FUNCTION_LINES} lines: {long}"


def test_signatures_can_be_remembered() -> None:
    many = {
        f"{source.name}:{function.name}": count
        for source in sources()
        for function in source.functions
        if (count := _parameters(function.args)) > PARAMETERS
    }
    assert many.keys() == MANY_PARAMETERS.keys(), f"the cap is {PARAMETERS} parameters: {many}"


def _parameters(arguments: ast.arguments) -> int:
    return len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)


def test_names_say_what_is_inside() -> None:
    for source in sources():
        assert source.path.stem not in BANNED_NAMES, f"{source.name}: name the file by its content"
        assert ast.get_docstring(source.tree), f"{source.name} has no module docstring"
        classes = [node.name for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
        assert not [name for name in classes if BANNED_WORDS.search(name)], source.name


def test_nobody_reaches_for_another_modules_underscore() -> None:
    for source in sources():
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{source.name}:{node.lineno} imports {private} from {node.module}"


def test_every_silenced_check_gives_its_reason() -> None:
    for source in sources():
        for number, line in enumerate(source.text.splitlines(), 1):
            found = re.search(r"#\s*(noqa|type: ignore)(.*)", line)
            if found:
                place = f"{source.name}:{number}"
                assert re.search(r"[\[:]\s*[\w-]+", found[2]), f"{place}: a silenced check names its rule"
                assert re.search(r"(-|#) *\w+ \w+", found[2]), f"{place}: a silenced check gives its reason"


def test_nothing_is_left_for_later() -> None:
    for source in sources():
        left = re.search(r"\b(TODO|FIXME|XXX|HACK)\b|breakpoint\(", source.text)
        assert not left, f"{source.name}: {left}"
