"""Tokens used by one call, in disjoint buckets.

Providers count differently (OpenAI: cached is a part of the prompt; Anthropic: cached comes on top). A `Usage`
never does: every prompt token is in exactly one input bucket. Knows no prices.
"""

import msgspec


class Usage(msgspec.Struct, frozen=True):
    """Tokens, each counted once. Unknown is not a Usage of zeros: it is None.

    `reasoning_tokens` and `output_audio_tokens` are parts of `output_tokens`; `input_audio_tokens` is a part of
    `input_tokens` and `cache_read_audio_tokens` of `cache_read_tokens`, reported because they may have their own
    price. Everything else is disjoint.
    """

    input_tokens: int = 0  # fresh: neither read from nor written to a cache
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0  # writes whose life is not stated are of this kind
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    cache_read_audio_tokens: int = 0
    output_audio_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """All input, cached or not: what picks a price tier."""
        return (
            self.input_tokens
            + self.cache_read_tokens
            + self.cache_write_5m_tokens
            + self.cache_write_1h_tokens
        )

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens
