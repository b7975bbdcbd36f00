"""What is said: deterministic, honest, cut at stops, and cached when it comes back as history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_engine.simulator import tokenizer
from local_engine.simulator.speech import STATEMENT, Speech, Text, ToolCall, Words, sampling_seed


def heard(saying, *, seed=1, stops=(), limit=400):
    speech = Speech(saying, seed, stops)
    tokens, pieces, is_last = [], [], False
    while not is_last and len(tokens) < limit:
        token, is_last = speech.next_token()
        tokens.append(token)
        pieces.append(speech.latest)
    return tokens, pieces, speech


def text_of(pieces):
    return "".join(piece.text for piece in pieces if piece.kind == "text")


def test_words_begin_by_saying_that_this_is_a_simulator():
    assert text_of(heard(Words())[1]).startswith(STATEMENT)
    assert "Headgate engine simulator" in STATEMENT


def test_what_is_said_follows_from_seed_model_prompt_and_sampling_seed_alone():
    parts = (3, "demo", [1, 2, 3], None, 0)
    same = sampling_seed(*parts)
    assert sampling_seed(*parts) == same
    others = [
        (4, *parts[1:]),
        (3, "x", *parts[2:]),
        (3, "demo", [1, 2], None, 0),
        (3, "demo", [1, 2, 3], 9, 0),
    ]
    assert len({sampling_seed(*other) for other in others} | {same}) == 5
    assert heard(Words(), seed=same)[0] == heard(Words(), seed=same)[0]
    assert heard(Words(), seed=same)[0] != heard(Words(), seed=same + 1)[0]


@given(st.integers(0, 2**64 - 1))
def test_an_answer_tokenizes_to_the_tokens_it_was_said_in(seed):
    tokens, pieces, _ = heard(Words(), seed=seed)
    assert tokenizer.encode(text_of(pieces)) == tokens


def test_words_end_by_themselves_unless_told_not_to():
    assert len(heard(Words())[0]) < 150
    assert len(heard(Words(min_tokens=200))[0]) >= 200
    assert len(heard(Words(never_ends=True), limit=2000)[0]) == 2000


@given(
    st.text(alphabet="ab ,é", min_size=1),
    st.lists(st.text(alphabet="ab ,é", min_size=1), min_size=1, max_size=3),
)
def test_text_ends_where_the_first_stop_would_begin(text, stops):
    _, pieces, speech = heard(Text(text), stops=tuple(stops))
    at = min((text.find(stop) for stop in stops if stop in text), default=len(text))
    assert text_of(pieces) == text[:at]
    assert (speech.stop_reason is not None) == (at < len(text))


def test_an_empty_text_still_takes_one_token():
    tokens, pieces, _ = heard(Text(""))
    assert len(tokens) == 1
    assert text_of(pieces) == ""


@pytest.mark.parametrize("stops", [(), ("x", "{")])
def test_a_tool_call_gives_its_name_and_then_its_arguments_in_pieces(stops):
    _, pieces, _ = heard(ToolCall("get_weather_now", '{"city":"xyz"}'), stops=stops)
    assert (pieces[0].kind, pieces[0].text) == ("call", "get_weather_now")
    assert all(piece.kind == "arguments" for piece in pieces[1:])
    assert "".join(piece.text for piece in pieces[1:]) == '{"city":"xyz"}'
    assert len([piece for piece in pieces if piece.text]) > 3
