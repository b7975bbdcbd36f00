"""Whether an upstream's refusal means that the prompt does not fit its context window.

Only OpenAI gives it a code; everybody else says it in words, which are collected here. A refusal that is not
recognised is relayed as it is, so a missing phrase costs a fallback, never an answer.
"""

import re
from typing import Final

_LOOKED_AT_BYTES: Final = 4096
_PHRASES: Final = re.compile(
    rb"context_length_exceeded"  # OpenAI's code, and of those who copy it
    rb"|maximum (?:context|prompt|model) length"  # OpenAI, vLLM, OpenRouter, Mistral; xAI
    rb"|context (?:window|length|limit)"  # OpenAI (Responses), Anthropic (with max_tokens), Together, llama.cpp
    rb"|(?:prompt|input|request) is too long"  # Anthropic; Bedrock
    rb"|longer than the (?:maximum )?(?:model|context)"  # vLLM; SGLang
    rb"|exceeds the maximum number of tokens"  # Gemini
    rb"|reduce the length of the (?:messages|prompt|input)",  # Groq
    re.IGNORECASE,
)


def says_overflow(body: bytes) -> bool:
    """`body` is that of a 400, 413 or 422."""
    return _PHRASES.search(body, 0, _LOOKED_AT_BYTES) is not None
