import json
import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.json_object import MAX_SLACK_BYTES, members, read_object

SPACES = ["", "", "", " ", "\n", "\t", " \r\n  "]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
KEYS = TEXT | st.sampled_from(
    ["model", "stream", "a", "b", "", 'q"uote', "back\\slash", "{", "}", ",", ":", "é", "🙂"]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
STYLES = [(",", ":"), (", ", ": "), None]


def write_text(text: str, dice: random.Random) -> str:
    """A JSON string in one of its many spellings."""
    parts = []
    for character in text:
        if dice.random() < 0.2:
            units = character.encode("utf-16-be")
            parts += [f"\\u{units[i : i + 2].hex()}" for i in range(0, len(units), 2)]
        elif character == "/" and dice.random() < 0.5:
            parts.append("\\/")
        else:
            parts.append(json.dumps(character, ensure_ascii=dice.random() < 0.5)[1:-1])
    return f'"{"".join(parts)}"'


def write(value: object, dice: random.Random) -> str:
    """JSON text with white space and escapes wherever they may be."""

    def space() -> str:
        return dice.choice(SPACES)

    if isinstance(value, dict):
        return write_pairs(list(value.items()), dice)
    if isinstance(value, list):
        inner = ",".join(f"{space()}{write(item, dice)}{space()}" for item in value)
        return f"[{inner or space()}]"
    return write_text(value, dice) if isinstance(value, str) else json.dumps(value)


def write_pairs(pairs: list[tuple[str, object]], dice: random.Random) -> str:
    def space() -> str:
        return dice.choice(SPACES)

    inner = ",".join(
        f"{space()}{write_text(key, dice)}{space()}:{space()}{write(value, dice)}{space()}"
        for key, value in pairs
    )
    return f"{{{inner or space()}}}"


@st.composite
def objects(draw, min_size=0):
    """A dict, and one of the texts that mean it."""
    content = draw(st.dictionaries(KEYS, VALUES, min_size=min_size, max_size=6))
    style = draw(st.sampled_from(STYLES))
    dice = draw(st.randoms(use_true_random=False))
    if style is None:
        text = dice.choice(SPACES) + write(content, dice) + dice.choice(SPACES)
    else:
        text = json.dumps(content, separators=style, ensure_ascii=draw(st.booleans()))
    return content, text.encode()


@given(objects())
@settings(max_examples=400, deadline=None)
def test_members_are_found_where_they_lie(made):
    content, body = made
    found = members(body)
    assert [member.key for member in found] == list(content)
    for member in found:
        assert json.loads(body[member.value_start : member.value_end]) == content[member.key]
        assert body[member.start : member.start + 1] == b'"'
        between = body[member.start : member.value_start].rstrip(b" \t\r\n")
        assert between.endswith(b":")
        assert json.loads(between[:-1]) == member.key
    values = read_object(body).values
    assert [bytes(value) for value in values.values()] == [body[m.value_start : m.value_end] for m in found]


@given(objects(min_size=1), st.data())
@settings(max_examples=400, deadline=None)
def test_an_object_with_a_duplicate_key_is_refused_however_it_is_written(made, data):
    content, _ = made
    key = data.draw(st.sampled_from(list(content)))
    pairs = list(content.items())
    again = data.draw(st.one_of(st.just(content[key]), VALUES))
    pairs.insert(data.draw(st.integers(0, len(pairs))), (key, again))
    style = data.draw(st.sampled_from(STYLES))
    if style is None:
        text = write_pairs(pairs, data.draw(st.randoms(use_true_random=False)))
    else:
        comma, colon = style
        text = (
            "{" + comma.join(json.dumps(k) + colon + json.dumps(v, separators=style) for k, v in pairs) + "}"
        )
    with pytest.raises(ValueError, match="given twice"):
        members(text.encode())


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":12,"a":1}',
        b'{"a":1,"a":12}',
        b'{"a":"x","b":1,"a":"x"}',
        b'{"a":1,"\\u0061":1}',
        b'{"\\u0061":"evil","a":"good"}',
        b'{ "a" : [1] , "a" : [1] }',
        b'{"a": 1, "b": 2, "a": 1}',
        b'{"a":{"a":1},"a":{"a":1}}',
        # Made so that a walk by lengths alone, misled by the first `a`, goes through the decoys inside a later
        # value and still meets every key once and ends at the end.
        b'{"a":{"p":0,"z":0},"a":123456,"k":"kkkkk","z":{"r":0' + b" " * 20 + b',"k":"yyyy"}}',
        b'{"a": 1,"k":"kk","m0":0,"m1":22,"a":{"r":1, "k": "kk", "m0": 0, "m1": 1}, "z": 0}',
        b'{"":0,"":0}',
    ],
)
def test_known_ways_to_hide_a_duplicate_fail(body):
    with pytest.raises(ValueError, match="given twice"):
        members(body)


def test_keys_inside_values_are_nobodys_business():
    body = b'{"model":"m","messages":[{"model":"x","model":"y"}],"tools":{"model":{"model":1}}}'
    assert [member.key for member in members(body)] == ["model", "messages", "tools"]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"1", b"null", b'{"a":1', b'{"a":1,}', b'{"a" 1}', b'{"a":1} x', b"{,}"]
)
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(msgspec.DecodeError):
        members(body)


def test_a_sea_of_white_space_is_refused_rather_than_waded_through():
    assert members(b'{"a":1' + b" " * 60_000 + b"}")
    with pytest.raises(ValueError, match="white space"):
        members(b'{"a":1' + b" " * (MAX_SLACK_BYTES + 10) + b"}")
