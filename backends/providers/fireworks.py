"""Fireworks AI. All dialects under one base; Messages take the key as a bearer token too.

Its prompt cache follows `x-session-affinity` or `prompt_cache_key`.
"""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="fireworks",
    base_url="https://api.fireworks.ai/inference/v1",
    key_env="FIREWORKS_API_KEY",
    base_url_env="FIREWORKS_BASE_URL",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES),
    prices="fireworks",
    forwards=frozenset({"x-session-affinity", "anthropic-version", "anthropic-beta"}),
    docs="https://docs.fireworks.ai/tools-sdks/openai-compatibility",
)
