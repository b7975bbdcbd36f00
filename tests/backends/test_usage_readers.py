import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.dialect import CHAT, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, MESSAGES, RAW, RESPONSES
from backends.usage import Usage
from backends.usage_readers import Reading, estimate_input, read_usage
from tests.support.answers import usages, whole
from tests.support.properties import STEADY


def read(dialect, usage, **members):
    reading = read_usage(dialect, json.dumps({**members, "usage": usage}).encode())
    assert reading is not None
    return reading.usage


@pytest.mark.parametrize("dialect", [CHAT, COMPLETIONS, RESPONSES, MESSAGES], ids=lambda d: d.name)
@STEADY
@given(data=st.data())
def test_what_an_upstream_says_is_what_is_read(dialect, data):
    usage = data.draw(usages(dialect))
    tier = "standard" if dialect is MESSAGES else "flex"
    assert read_usage(dialect, whole(dialect, usage, 'a "usage": {', tier="flex")) == Reading(
        usage, "m-1", tier
    )


@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES], ids=lambda d: d.name)
def test_raw_answers_tell_their_format_by_themselves(dialect):
    usage = Usage(10, 20, 30, 0, 50, 5)
    reading = read_usage(RAW, whole(dialect, usage))
    assert reading is not None
    assert reading.usage == usage


def test_openai_counts_cached_tokens_inside_the_prompt():
    told = {
        "prompt_tokens": 10_000,
        "completion_tokens": 300,
        "prompt_tokens_details": {"cached_tokens": 8_000},
    }
    assert read(CHAT, told) == Usage(input_tokens=2_000, cache_read_tokens=8_000, output_tokens=300)


def test_anthropic_counts_cached_tokens_beside_the_input():
    told = {
        "input_tokens": 19,
        "cache_read_input_tokens": 512,
        "cache_creation_input_tokens": 7,
        "output_tokens": 3,
    }
    assert read(MESSAGES, told) == Usage(19, 512, 7, 0, 3)


def test_cache_writes_are_split_by_their_life():
    told = {
        "input_tokens": 1,
        "cache_creation_input_tokens": 30,
        "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
        "output_tokens": 0,
    }
    assert read(MESSAGES, told) == Usage(1, 0, 10, 20, 0)


def test_cache_writes_of_unstated_life_are_of_the_short_kind():
    told = {"input_tokens": 1, "cache_creation_input_tokens": 30, "cache_creation": {}, "output_tokens": 0}
    assert read(MESSAGES, told) == Usage(1, 0, 30, 0, 0)


def test_the_total_of_cache_writes_is_at_least_its_parts():
    told = {"input_tokens": 1, "cache_creation": {"ephemeral_1h_input_tokens": 20}, "output_tokens": 2}
    assert read(MESSAGES, told) == Usage(1, 0, 0, 20, 2)


def test_compacting_a_conversation_is_billed_on_top():
    told = {
        "input_tokens": 23,
        "output_tokens": 10,
        "iterations": [
            {"type": "compaction", "input_tokens": 180, "output_tokens": 35},
            {"type": "message", "input_tokens": 23, "output_tokens": 10},
        ],
    }
    assert read(MESSAGES, told) == Usage(203, 0, 0, 0, 45)


def test_fast_mode_is_a_tier_of_its_own():
    body = (
        b'{"model":"c","usage":{"input_tokens":1,"output_tokens":1,"service_tier":"standard","speed":"fast"}}'
    )
    assert read_usage(MESSAGES, body) == Reading(Usage(1, output_tokens=1), "c", "fast")


def test_vllm_creating_cache_blocks_is_not_a_billed_write():
    told = {
        "prompt_tokens": 531,
        "total_tokens": 541,
        "completion_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": 512, "multimodal_tokens": None},
    }
    assert read(CHAT, told) == Usage(input_tokens=531, output_tokens=10)


@pytest.mark.parametrize(
    "where",
    [
        {"prompt_tokens_details": {"cached_tokens": 64}},
        {"cached_tokens": 64},
        {"prompt_cache_hit_tokens": 64, "prompt_cache_miss_tokens": 36},
        {"cache_read_input_tokens": 64},
        {"prompt_tokens_details": {"cached_tokens": 64}, "cached_tokens": 64},
        {"prompt_tokens_details": None, "prompt_cache_hit_tokens": 64},
    ],
)
def test_cached_tokens_are_found_where_providers_put_them(where):
    assert read(CHAT, {"prompt_tokens": 100, "completion_tokens": 1, **where}) == Usage(
        36, 64, output_tokens=1
    )


def test_cache_write_tokens_are_a_part_of_the_prompt():
    details = {"cached_tokens": 50, "cache_write_tokens": 30}
    assert read(
        CHAT, {"prompt_tokens": 100, "completion_tokens": 1, "prompt_tokens_details": details}
    ) == Usage(20, 50, 30, output_tokens=1)
    assert read(
        RESPONSES, {"input_tokens": 100, "output_tokens": 1, "input_tokens_details": details}
    ) == Usage(20, 50, 30, output_tokens=1)


def test_reasoning_is_a_part_of_the_output():
    told = {
        "prompt_tokens": 5,
        "completion_tokens": 90,
        "completion_tokens_details": {"reasoning_tokens": 64},
    }
    assert read(CHAT, told | {"total_tokens": 95}) == Usage(5, output_tokens=90, reasoning_tokens=64)


def test_reasoning_told_of_beside_the_completion_is_added_to_it():
    details = {"reasoning_tokens": 64}
    told = {
        "prompt_tokens": 5,
        "completion_tokens": 9,
        "total_tokens": 78,
        "completion_tokens_details": details,
    }
    assert read(CHAT, told) == Usage(5, output_tokens=73, reasoning_tokens=64)


def test_reasoning_that_only_the_total_tells_of_is_output():
    told = {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 544}
    assert read(CHAT, told) == Usage(7, output_tokens=537, reasoning_tokens=527)


def test_more_reasoning_than_completion_cannot_be_a_part_of_it():
    told = {"prompt_tokens": 33, "completion_tokens": 71, "total_tokens": 104, "reasoning_tokens": 733}
    assert read(CHAT, told) == Usage(33, output_tokens=804, reasoning_tokens=733)


def test_a_cache_counted_beside_the_prompt_is_seen_in_the_total():
    told = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 115, "cache_read_input_tokens": 100}
    assert read(CHAT, told) == Usage(10, 100, output_tokens=5)


def test_audio_tokens_are_parts_of_what_they_are_in():
    told = {
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "prompt_tokens_details": {
            "cached_tokens": 40,
            "audio_tokens": 70,
            "cached_tokens_details": {"audio_tokens": 30},
        },
        "completion_tokens_details": {"audio_tokens": 45, "reasoning_tokens": 5},
    }
    assert read(CHAT, told) == Usage(60, 40, 0, 0, 50, 5, 40, 30, 45)


def test_audio_that_does_not_fit_the_fresh_input_was_cached():
    told = {
        "prompt_tokens": 100,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": 40, "audio_tokens": 70},
    }
    assert read(CHAT, told) == Usage(60, 40, input_audio_tokens=60, cache_read_audio_tokens=10)


def test_embeddings_have_no_output():
    assert read(EMBEDDINGS, {"prompt_tokens": 8, "total_tokens": 8}) == Usage(8)
    assert read(EMBEDDINGS, {"total_tokens": 8}) == Usage(8)


@pytest.mark.parametrize("usage", [None, {}, [], "none", 7, {"prompt_tokens": None}, {"prompt_tokens": -1}])
@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES, EMBEDDINGS], ids=lambda d: d.name)
def test_no_usage_is_none_not_zero(dialect, usage):
    assert read(dialect, usage) is None


def test_an_explicit_zero_is_usage():
    assert read(CHAT, {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}) == Usage()
    assert read(MESSAGES, {"input_tokens": 0, "output_tokens": 0}) == Usage()


@pytest.mark.parametrize("absurd", [-5, 10**13, 1e300, 2.5, "many", True, [], {}, None])
def test_a_number_that_cannot_be_counts_as_not_given(absurd):
    assert read(CHAT, {"prompt_tokens": absurd, "completion_tokens": 5, "total_tokens": 15}) == Usage(
        10, output_tokens=5
    )
    details = {"cached_tokens": absurd}
    assert read(
        CHAT, {"prompt_tokens": 10, "completion_tokens": 5, "prompt_tokens_details": details}
    ) == Usage(10, output_tokens=5)


@pytest.mark.parametrize("number", [12.0, "12"])
def test_a_whole_number_may_be_written_as_a_float_or_as_text(number):
    assert read(CHAT, {"prompt_tokens": number, "completion_tokens": 1}) == Usage(12, output_tokens=1)


def test_more_cached_than_prompt_is_cut_to_the_prompt():
    details = {"cached_tokens": 50, "cache_write_tokens": 9, "audio_tokens": 80}
    told = {"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": details}
    assert read(CHAT, told) == Usage(0, 10, output_tokens=1, cache_read_audio_tokens=10)


def test_a_member_of_the_wrong_type_spoils_only_itself():
    told = {"prompt_tokens": 10, "completion_tokens": 1, "prompt_tokens_details": "none", "cached_tokens": 4}
    reading = read_usage(CHAT, json.dumps({"model": 5, "service_tier": {}, "usage": told}).encode())
    assert reading == Reading(Usage(6, 4, output_tokens=1), "", "")


def test_text_that_is_not_utf_8_does_not_hide_the_usage():
    body = b'{"model":"\xff","usage":{"prompt_tokens":1,"completion_tokens":2}}'
    assert read_usage(CHAT, body) == Reading(Usage(1, output_tokens=2), "", "")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"7", b"<html>", b"[" * 100_000, b'{"a":' * 100_000]
)
@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, MESSAGES, EMBEDDINGS, RAW], ids=lambda d: d.name)
def test_what_is_not_a_json_object_is_no_reading(dialect, body):
    assert read_usage(dialect, body) is None


def test_counting_tokens_uses_none():
    assert read_usage(COUNT_TOKENS, b'{"input_tokens": 2095}') == Reading()


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-10, 200),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
)
PARTS = st.sampled_from(
    ["cached_tokens", "cache_write_tokens", "audio_tokens", "reasoning_tokens", "thinking_tokens"]
)
NAMES = st.sampled_from(
    [
        *(
            "prompt_tokens",
            "completion_tokens",
            "total_tokens",
            "prompt_tokens_details",
            "completion_tokens_details",
        ),
        *(
            "input_tokens",
            "output_tokens",
            "cache_creation",
            "cache_read_input_tokens",
            "iterations",
            "speed",
        ),
    ]
)


@STEADY
@given(
    st.sampled_from([CHAT, RESPONSES, MESSAGES, EMBEDDINGS, RAW]),
    st.dictionaries(NAMES, SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(PARTS, SCALARS)),
)
def test_whatever_an_upstream_says_buckets_are_disjoint_and_not_negative(dialect, told):
    usage = read(dialect, told)
    if usage is not None:
        assert min(msgspec.structs.astuple(usage)) >= 0
        assert usage.input_audio_tokens <= usage.input_tokens
        assert usage.cache_read_audio_tokens <= usage.cache_read_tokens
        assert usage.reasoning_tokens + usage.output_audio_tokens <= usage.output_tokens


def test_nothing_delivered_is_estimated_as_a_token_per_four_bytes_of_request():
    assert estimate_input(0) == Usage()
    assert estimate_input(401) == Usage(input_tokens=101)
