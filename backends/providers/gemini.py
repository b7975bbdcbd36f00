"""Google Gemini through its OpenAI-compatible endpoint.

It refuses fields that it does not know (`Unknown name "...": Cannot find field.`) and accepts `stream_options`.
"""

from backends.dialect import CHAT, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="gemini",
    base_url="https://generativelanguage.googleapis.com/v1beta/openai",
    key_env="GEMINI_API_KEY",
    base_url_env="GEMINI_BASE_URL",
    paths=paths(CHAT, EMBEDDINGS),
    prices="google",
    # liliMozi/openhanako#2494
    drops=frozenset(
        {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier"}
    ),
    docs="https://ai.google.dev/gemini-api/docs/openai",
)
