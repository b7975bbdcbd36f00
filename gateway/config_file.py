"""The configuration file as text: YAML to plain values, `${VAR}` from the environment, and where each key stands.

Owns how problems are reported: all of them at once, each with line and key path. Refuses to know what the keys
mean. Environment values go into strings after the YAML was parsed, so they cannot change its structure, and no
message repeats one.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import yaml

Location = tuple[str | int, ...]

MAX_FILE_BYTES: Final = 4 << 20
# Aliases multiply: ten levels of ten make 10**10 values out of a hundred bytes.
MAX_VALUES: Final = 100_000
# libyaml's composer recurses in C: thousands of levels end the process, not the parse.
MAX_DEPTH: Final = 40
# Shorter values from the environment (a port, a level) are no secrets, and occur in messages by chance.
_MIN_SECRET_CHARACTERS: Final = 6

_PLACEHOLDER: Final = re.compile(r"\$\$\{|\$\{((?:[^{}$]|\$(?!\{))*)\}|\$\{")
_NAME_AND_DEFAULT: Final = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?::-(.*))?", re.DOTALL)
_MERGE_TAG: Final = "tag:yaml.org,2002:merge"
_NULL_TAG: Final = "tag:yaml.org,2002:null"


class Problem(NamedTuple):
    """`location` () is the file as a whole; `line` counts from 1, 0: unknown."""

    location: Location
    message: str
    line: int = 0


class ConfigError(Exception):
    """The file cannot be used. One line for each problem, with what to change; never a secret."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        self.path = path
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        self.lines = tuple(_line(path, problem) for problem in self.problems)
        super().__init__("\n".join(self.lines))


class Document(NamedTuple):
    """What the file says. `problems` are those that did not stop the reading; `taken` is the environment's part."""

    values: dict[str, Any]
    lines: Mapping[Location, int]
    problems: list[Problem]
    taken: Mapping[str, str]  # variable -> value

    def line(self, location: Location) -> int:
        """The line of a key, or of the nearest thing around it that is in the file."""
        while location and location not in self.lines:
            location = location[:-1]
        return self.lines.get(location, 0)

    def complete(self, problem: Problem) -> Problem:
        """With its line, and with the names of variables where their values were."""
        message = problem.message
        for name, value in sorted(self.taken.items(), key=lambda item: -len(item[1])):
            if len(value) >= _MIN_SECRET_CHARACTERS:
                message = message.replace(value, f"${{{name}}}")
        return Problem(problem.location, message, problem.line or self.line(problem.location))


def read_document(path: Path, environ: Mapping[str, str]) -> Document:
    """Raises ConfigError when there is no mapping to be had from the file."""
    text = ""
    try:
        text = _load_text(path)
        return _Reader(environ).read(text)
    except yaml.YAMLError as error:
        problem = _yaml_problem(error, text)
    except FileNotFoundError:
        problem = Problem((), "there is no such file (--config names another)")
    except OSError as error:
        problem = Problem((), f"cannot be read: {error.strerror or error}")
    except _UnusableError as error:
        problem = error.problem
    raise ConfigError(path, [problem]) from None


def format_location(location: Location) -> str:
    """`models.demo.targets[0].pool`; keys that hold a dot or a blank are quoted."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[^\s.\[\]\"]+", part):
            text += f".{part}" if text else part
        else:
            text += f'["{part}"]'
    return text


class _UnusableError(Exception):
    """Nothing sensible can be made of the rest of the file."""

    def __init__(self, message: str, line: int = 0, location: Location = ()) -> None:
        super().__init__(message)
        self.problem = Problem(location, message, line)


def _line(path: Path, problem: Problem) -> str:
    where = f"{path.name}:{problem.line}" if problem.line else path.name
    key = format_location(problem.location)
    return f"{where}: {key}: {problem.message}" if key else f"{where}: {problem.message}"


def _load_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise _UnusableError(f"is larger than {MAX_FILE_BYTES >> 20} MiB; that is not a configuration file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _UnusableError("is not UTF-8 text", data.count(b"\n", 0, error.start) + 1) from None


def _yaml_problem(error: yaml.YAMLError, text: str) -> Problem:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "not valid YAML"
    line = 0
    if mark is not None:
        line = mark.line + 1
        if what == "found character that cannot start any token":
            what = "indented with a tab, or a value starts with a reserved character (use spaces, quote the value)"
        elif what == "mapping values are not allowed in this context":
            what = "a `:` where none can be: wrong indentation, or a text with `: ` in it that needs quotes"
        elif "${" in "".join(text.splitlines()[mark.line : line]):
            what += '; inside {...} and [...], ${VAR} needs quotes: "${VAR}"'
    return Problem((), f"not valid YAML: {what}", line)


class _Reader:
    """Builds plain values out of YAML nodes. One per file."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._lines: dict[Location, int] = {}
        self._problems: list[Problem] = []
        self._open: set[int] = set()  # nodes being built: an alias to one of them would never end
        self._left = MAX_VALUES
        self._taken: dict[str, str] = {}

    def read(self, text: str) -> Document:
        _check_depth(text)
        self._loader = yaml.CSafeLoader(text)
        node = self._loader.get_single_node()
        if node is None or node.tag == _NULL_TAG:
            raise _UnusableError("is empty; start from the config.yaml that comes with Headgate")
        if not isinstance(node, yaml.MappingNode):
            raise _UnusableError("must be a mapping of sections (`server:`, `models:`, ...)", 1)
        return Document(self._mapping(node, ()), self._lines, self._problems, self._taken)

    def _value(self, node: yaml.Node, location: Location) -> Any:
        self._left -= 1
        if self._left < 0 or id(node) in self._open:
            raise _UnusableError(
                "YAML aliases that refer to themselves or multiply", node.start_mark.line + 1, location
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, location)
        if not node.tag.endswith((":map", ":seq")):
            message = f"the YAML tag {node.tag} is not supported; remove it"
            self._problems.append(Problem(location, message, node.start_mark.line + 1))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, location)
            items = []
            for index, item in enumerate(node.value):
                self._lines[*location, index] = item.start_mark.line + 1
                items.append(self._value(item, (*location, index)))
            return items
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag == _MERGE_TAG:
                sources = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                for source in sources:
                    value = self._value(source, location)
                    if not isinstance(value, dict):
                        raise _UnusableError("`<<` takes a mapping or a list of mappings", line, location)
                    merged = value | merged
                continue
            key = self._key(key_node, location)
            if key in values:
                self._problems.append(Problem((*location, key), "is there twice; remove one of them", line))
                continue
            self._lines[*location, key] = line
            values[key] = self._value(value_node, (*location, key))
        return merged | values

    def _key(self, node: yaml.Node, location: Location) -> str:
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            raise _UnusableError("a key must be a plain text", line, location)
        text: str = node.value
        if not node.tag.endswith(":str"):
            message = f'the key {text} is not a text in YAML; write it as "{text}"'
            self._problems.append(Problem(location, message, line))
        return text

    def _scalar(self, node: yaml.ScalarNode, location: Location) -> Any:
        try:
            value = self._constructed(node)
        except (yaml.constructor.ConstructorError, ValueError, TypeError):
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            message = f"not a valid YAML value of the kind {kind}; put it in quotes if it is a text"
            self._problems.append(Problem(location, message, node.start_mark.line + 1))
            return None
        if not isinstance(value, str) or "${" not in value:
            return value
        try:
            return interpolate(value, self._environ, self._taken)
        except ValueError as error:
            self._problems.append(Problem(location, str(error), node.start_mark.line + 1))
            return value

    def _constructed(self, node: yaml.ScalarNode) -> Any:
        value = self._loader.construct_object(node)
        if isinstance(value, bytes):
            raise TypeError("no setting is binary")
        return value


def interpolate(text: str, environ: Mapping[str, str], taken: dict[str, str]) -> str:
    """`${VAR}` and `${VAR:-default}` (unset or empty: the default); `$${` is a literal `${`.

    Variables whose values were used are added to `taken`. Raises ValueError with a sentence; values of variables
    are not in it.
    """

    def replace(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        named = _NAME_AND_DEFAULT.fullmatch(match[1]) if match[1] is not None else None
        if named is None:
            raise ValueError(
                "write ${VAR} or ${VAR:-default}, without another ${...} inside, or $${ for a literal ${"
            )
        name, default = named.groups()
        value = environ.get(name, "")
        if value:
            taken[name] = value
            return value
        if default is not None:
            return default
        if name in environ:
            return value
        raise ValueError(f"the environment variable {name} is not set; set it, or write ${{{name}:-default}}")

    return _PLACEHOLDER.sub(replace, text)


def _line_of(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 0


def _check_depth(text: str) -> None:
    """By events, which libyaml produces without recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _UnusableError(f"nested more than {MAX_DEPTH} deep", _line_of(event))
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
