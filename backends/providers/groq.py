"""Groq. Answers 400 to request properties that it does not know (`property '...' is unsupported`)."""

from backends.dialect import CHAT, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="groq",
    base_url="https://api.groq.com/openai/v1",
    key_env="GROQ_API_KEY",
    base_url_env="GROQ_BASE_URL",
    paths=paths(CHAT, RESPONSES),
    prices="groq",
    # zed-industries/zed#36215, sipeed/picoclaw#1196
    drops=frozenset(
        {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier"}
    ),
    docs="https://console.groq.com/docs/openai",
)
