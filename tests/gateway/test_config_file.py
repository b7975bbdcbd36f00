from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config_file import ConfigError, format_location, interpolate, read_document


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "config.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def refusal(directory: Path, text: str | bytes, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        read_document(write(directory, text), environ or {})
    return str(caught.value)


def test_a_missing_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_document(tmp_path / "nope.yaml", {})
    assert str(caught.value) == "nope.yaml: there is no such file (--config names another)"


def test_a_directory_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory$"):
        read_document(tmp_path, {})


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "~"])
def test_an_empty_file_says_where_to_start(tmp_path, text):
    assert "is empty; start from the config.yaml" in refusal(tmp_path, text)


@pytest.mark.parametrize("text", ["- 1", "text", "12"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    assert "must be a mapping of sections" in refusal(tmp_path, text)


def test_a_tab_is_named_with_its_line(tmp_path):
    assert refusal(tmp_path, "a:\n\tb: 1").startswith("config.yaml:2: not valid YAML: indented with a tab")


def test_an_unquoted_placeholder_in_braces_is_explained(tmp_path):
    told = refusal(tmp_path, "server: {port: ${PORT:-1}}", {})
    assert '${VAR} needs quotes: "${VAR}"' in told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"a: \xff", "is not UTF-8 text"),
        ("a: \x00", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("a: *nope", "undefined alias"),
        ("a: 1\n b: 2", "a `:` where none can be"),
        ("a: 1\n---\nb: 2", "another document"),
        ("? [1, 2]\n: x", "a key must be a plain text"),
        ("[" * 100_000, "nested more than 40 deep"),
        ("a: &x [*x]", "aliases that refer to themselves"),
        ("a: {<<: 1}", "`<<` takes a mapping"),
    ],
)
def test_what_is_not_yaml_is_one_sentence(tmp_path, text, told):
    refused = refusal(tmp_path, text)
    assert told in refused
    assert "\n" not in refused


def test_a_huge_file_is_refused(tmp_path):
    assert "larger than 4 MiB" in refusal(tmp_path, b"a" * (5 << 20))


def test_multiplying_aliases_are_refused(tmp_path):
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9))
    assert "multiply" in refusal(tmp_path, f"l0: &l0 [1]\n{levels}")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: 1\na: 2", "config.yaml:3: a: is there twice; remove one of them"),
        ("a: {x: 1, x: 2}", "config.yaml:1: a.x: is there twice; remove one of them"),
        ("a: !!python/object:os.system x", "a: not a valid YAML value"),
        ("a: !!binary eA==", "a: not a valid YAML value of the kind binary"),
        ("a: !foo {x: 1}", "a: the YAML tag !foo is not supported; remove it"),
        ("a: 2027-13-45", "a: not a valid YAML value of the kind timestamp"),
        ("no: 1", 'config.yaml:1: the key no is not a text in YAML; write it as "no"'),
        ("1: 1", "the key 1 is not a text"),
    ],
)
def test_what_spoils_a_single_key_is_a_problem_beside_others(tmp_path, text, told):
    path = write(tmp_path, text)
    document = read_document(path, {})
    assert told in "\n".join(ConfigError(path, document.problems).lines)


def test_anchors_and_merges_are_taken(tmp_path):
    text = "base: &base {x: 1, y: 1}\nmore: &more {y: 2, z: 2}\na: {<<: [*base, *more], y: 3}\nb: *base\n"
    values = read_document(write(tmp_path, text), {}).values
    assert values["a"] == {"x": 1, "y": 3, "z": 2}
    assert values["b"] == {"x": 1, "y": 1}


def test_every_key_knows_its_line_and_a_missing_one_its_section(tmp_path):
    document = read_document(write(tmp_path, "a:\n  b:\n    - 1\n    - c: 2\n"), {})
    assert document.line(("a", "b")) == 2
    assert document.line(("a", "b", 1, "c")) == 4
    assert document.line(("a", "b", 0, "nope", "deeper")) == 3
    assert document.line(("nope",)) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${A}", "1"),
        ("x${A}y${A}", "x1y1"),
        ("${A:-2}", "1"),
        ("${NONE:-2}", "2"),
        ("${EMPTY:-2}", "2"),
        ("${EMPTY}", ""),
        ("${NONE:-}", ""),
        ("${NONE:-https://h/v1?a=b:-c}", "https://h/v1?a=b:-c"),
        ("${NONE:-pa$s}", "pa$s"),
        ("$${A}", "${A}"),
        ("$A $ $$ {A}", "$A $ $$ {A}"),
        ("${NESTED}", "${A}"),  # what a variable holds is not read again
    ],
)
def test_placeholders_take_values_from_the_environment(text, expected):
    assert interpolate(text, {"A": "1", "EMPTY": "", "NESTED": "${A}"}, {}) == expected


@pytest.mark.parametrize("text", ["${", "${}", "${A", "${A-x}", "${A:?x}", "${1A}", "${A:-${B}}", "${A B}"])
def test_a_malformed_placeholder_is_refused(text):
    with pytest.raises(ValueError, match=r"write \$\{VAR\} or"):
        interpolate(text, {"A": "1", "B": "1"}, {})


def test_every_missing_variable_is_named_with_its_key(tmp_path):
    path = write(tmp_path, 'a: "${ONE}"\nb:\n  - x\n  - "${TWO} ${THREE:-3}"\n')
    lines = ConfigError(path, read_document(path, {}).problems).lines
    assert lines == (
        "config.yaml:1: a: the environment variable ONE is not set; set it, or write ${ONE:-default}",
        "config.yaml:4: b[1]: the environment variable TWO is not set; set it, or write ${TWO:-default}",
    )


def test_a_value_from_the_environment_never_becomes_structure(tmp_path):
    hostile = "x\nserver: {port: 1}\n# "
    document = read_document(write(tmp_path, 'a: "${A}"\nb: ${A}\n'), {"A": hostile})
    assert document.values == {"a": hostile, "b": hostile}


def test_keys_and_other_values_are_not_interpolated(tmp_path):
    assert read_document(write(tmp_path, '"${A}": 1\n'), {"A": "x"}).values == {"${A}": 1}


@pytest.mark.parametrize(
    ("location", "text"),
    [
        ((), ""),
        (("models", "demo", "targets", 0, "pol"), "models.demo.targets[0].pol"),
        (("models", "gpt-5.1", "targets"), 'models["gpt-5.1"].targets'),
        (("prices", "overrides", "acme/*"), "prices.overrides.acme/*"),
        (("a b",), '["a b"]'),
    ],
)
def test_locations_are_written_as_in_the_file(location, text):
    assert format_location(location) == text


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=200), st.text("{}[]:,-&*!|>'\"%@`#?<~ \t\nab$1.", max_size=120)))
def test_no_file_brings_the_reader_down(tmp_path_factory, content):
    path = write(tmp_path_factory.mktemp("fuzz"), content)
    try:
        assert isinstance(read_document(path, {}).values, dict)
    except ConfigError as error:
        assert len(error.lines) == 1  # noqa: PT017 - the other outcome
