"""The tokenizer: reversible, stateless, about four characters a token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from local_engine.simulator import tokenizer

PROSE = (
    "The gate at the head of the channel decides how much water goes where, and when there is too much of it the "
    "spillway opens, so that nothing downstream has to fail because of a storm in the hills."
)


@given(st.text())
def test_any_text_survives_a_round_trip(text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert all(256 <= token <= tokenizer.MAX_TOKEN for token in tokens)


@given(st.text())
def test_pieces_join_to_the_text_without_splitting_a_character(text):
    pieces = tokenizer.split(text)
    assert "".join(part for _, part in pieces) == text
    assert [token for token, _ in pieces] == tokenizer.encode(text)


def test_english_comes_to_about_four_characters_a_token():
    assert 3.5 <= len(PROSE) / len(tokenizer.encode(PROSE)) <= 5


def test_text_cannot_forge_a_special_token():
    assert tokenizer.TURN_START not in tokenizer.encode("<|start|>")
    assert tokenizer.decode([tokenizer.TURN_START]) == "<|start|>"


@pytest.mark.parametrize("token", [0, 7, 255, 9906, 200_018, tokenizer.MAX_TOKEN])
def test_ids_of_another_tokenizer_are_shown_by_number(token):
    assert tokenizer.decode([token]) == f"<|{token}|>"
