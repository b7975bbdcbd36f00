"""Cerebras. Answers 422 to request properties that it does not know."""

from backends.dialect import CHAT, COMPLETIONS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="cerebras",
    base_url="https://api.cerebras.ai/v1",
    key_env="CEREBRAS_API_KEY",
    base_url_env="CEREBRAS_BASE_URL",
    paths=paths(CHAT, COMPLETIONS),
    prices="cerebras",
    # zed-industries/zed#36215
    drops=frozenset(
        {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "safety_identifier"}
    ),
    docs="https://inference-docs.cerebras.ai/resources/openai",
)
