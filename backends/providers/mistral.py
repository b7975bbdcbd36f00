"""Mistral. Streams carry usage in their last chunk unasked; `stream_options.include_usage` is answered with 422.

It knows `prompt_cache_key` and the session affinity header, and refuses other fields of OpenAI's caching.
"""

from backends.dialect import CHAT, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="mistral",
    base_url="https://api.mistral.ai/v1",
    key_env="MISTRAL_API_KEY",
    base_url_env="MISTRAL_BASE_URL",
    paths=paths(CHAT, EMBEDDINGS),
    prices="mistral",
    may_ask_usage=False,
    # openai/openai-agents-python#442, charmbracelet/crush#653 (every unknown field is "extra_forbidden")
    drops=frozenset(
        {"stream_options", "prompt_cache_retention", "prompt_cache_options", "safety_identifier"}
    ),
    forwards=frozenset({"x-session-affinity"}),
    docs="https://docs.mistral.ai/api",
)
