from backends.usage import Usage


def test_the_prompt_is_all_input_cached_or_not():
    usage = Usage(input_tokens=1, cache_read_tokens=20, cache_write_5m_tokens=300, cache_write_1h_tokens=4000)
    assert usage.prompt_tokens == 4321


def test_parts_are_not_counted_twice_in_the_total():
    usage = Usage(
        input_tokens=10, output_tokens=5, reasoning_tokens=3, input_audio_tokens=10, output_audio_tokens=2
    )
    assert usage.total_tokens == 15
