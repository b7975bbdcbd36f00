"""The arrow of imports, and what each package refuses to know."""

import ast
import subprocess
import sys
from collections.abc import Iterator

from tests.support.sources import PACKAGES, ROOT, Source, sources

# Who may import a library that defines a layer.
ONLY_IN = {
    "aiohttp": {
        "gateway/management",
        "gateway/server.py",
        "gateway/floors.py",
        "gateway/webhook_sender.py",
        "local_engine",
    },
    "httptools": {"gateway/http_rules.py", "backends/http1.py"},
    "apsw": {"gateway/stores"},
    "cryptography": {"gateway/overflow/sealing.py"},
    "genai_prices": {"policies"},
    "redis": {"gateway/stores"},
    "yaml": {"gateway/config_file.py", "gateway/listed_file.py"},
    "typer": {"gateway/commands"},
    "rich": {"gateway/commands"},
}
# An import inside a function needs a reason here; the list may only shrink.
INSIDE_FUNCTIONS: dict[str, str] = {
    "policies/rules/condition.py": "CEL is 6 MB in every worker, and most have no condition",
}


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import at line {node.lineno}: imports are absolute"
            yield node.module or "", node.lineno


def type_checking_lines(tree: ast.AST) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines.update(child.lineno for child in ast.walk(node) if isinstance(child, ast.stmt))
    return lines


def test_imports_go_to_the_right_only() -> None:
    for source in sources():
        own = PACKAGES.index(source.name.partition("/")[0])
        for name, line in imported(source.tree):
            top = name.partition(".")[0]
            place = f"{source.name}:{line} imports {name}"
            assert top not in {"tests", "bench"}, place
            if top in PACKAGES:
                assert PACKAGES.index(top) >= own, f"{place}: the arrow is {' -> '.join(PACKAGES)}"


def test_libraries_that_define_a_layer_stay_in_it() -> None:
    used: dict[str, set[str]] = {library: set() for library in ONLY_IN}
    for source in sources():
        for name, line in imported(source.tree):
            library = name.partition(".")[0]
            if library in ONLY_IN:
                places = [place for place in ONLY_IN[library] if source.name.startswith(place)]
                assert places, f"{source.name}:{line} imports {name}"
                used[library].update(places)
    assert used == ONLY_IN, "a place that does not import its library any more must leave the list"


def test_policies_know_no_asyncio_no_http_and_no_clock() -> None:
    for source in sources():
        if source.name.startswith("policies/"):
            for name, line in imported(source.tree):
                top = name.partition(".")[0]
                place = f"{source.name}:{line} imports {name}"
                assert top not in {"asyncio", "http", "aiohttp", "httptools", "time"}, place


def test_nobody_waits_with_what_loses_cancellations() -> None:
    """`asyncio.wait_for` before 3.12 gives its result to a task that was cancelled in the same turn: that one then
    never ends. `asyncio.timeout` does not."""
    for source in sources():
        assert "wait_for(" not in source.text.replace("def wait_for(", ""), f"{source.name}: asyncio.timeout"


def test_no_import_hides_inside_a_function() -> None:
    hidden = {
        source.name
        for source in sources()
        for function in source.functions
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert hidden == INSIDE_FUNCTIONS.keys()


def test_nobody_imports_in_a_circle() -> None:
    graph = imports_by_module()
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name in done:
            return
        for target in graph[name]:
            visit(target, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def imports_by_module() -> dict[str, set[str]]:
    """Of our own modules, without what is imported for type checkers only."""
    modules = {module_name(source): source for source in sources()}
    graph: dict[str, set[str]] = {}
    for name, source in modules.items():
        skipped = type_checking_lines(source.tree)
        targets: set[str] = set()
        for node in ast.walk(source.tree):
            if getattr(node, "lineno", 0) in skipped:
                continue
            if isinstance(node, ast.ImportFrom) and node.module:
                targets.add(node.module)
                targets.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
        graph[name] = {target for target in targets if target in modules and target != name}
    return graph


def module_name(source: Source) -> str:
    return source.name.removesuffix(".py").replace("/", ".")


def test_a_worker_does_not_load_what_only_the_parent_needs() -> None:
    """Each worker has its own copy of what it loads; aiohttp alone is 6 MB."""
    program = "import sys, gateway.worker; print([name for name in {names} if name in sys.modules])"
    names = ["aiohttp", "prometheus_client", "redis", "rich", "typer", "watchfiles"]
    command = [sys.executable, "-c", program.format(names=names)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
