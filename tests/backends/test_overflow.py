import pytest

from backends.overflow import says_overflow


@pytest.mark.parametrize(
    "message",
    [
        '"code":"context_length_exceeded"',
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens",
        "Your input exceeds the context window of this model. Please adjust your input and try again.",
        "prompt is too long: 213462 tokens > 200000 maximum",
        "input length and `max_tokens` exceed context limit: 188240 + 21333 > 200000",
        "The input token count (1196265) exceeds the maximum number of tokens allowed (1048575).",
        "This model's maximum prompt length is 131072 but the request contains 537812 tokens.",
        "Please reduce the length of the messages or completion.",
        "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
        "The input (9000 tokens) is longer than the model's context length (8192 tokens).",
        "Input is too long for requested model.",
    ],
)
def test_what_providers_say_of_a_prompt_that_does_not_fit_is_recognised(message):
    assert says_overflow(b'{"error":{"message":"' + message.encode() + b'"}}')


@pytest.mark.parametrize(
    "message",
    [
        "Invalid value for 'temperature': must be between 0 and 2.",
        "max_tokens is too large: 100000. This model supports at most 16384 completion tokens",
        "Invalid type for 'messages[0].content'",
        "The string is too long for 'user': at most 64 characters",
    ],
)
def test_any_other_refusal_is_not_an_overflow(message):
    assert not says_overflow(b'{"error":{"message":"' + message.encode() + b'"}}')
