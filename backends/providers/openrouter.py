"""OpenRouter: a broker of providers, which normalises fields itself.

It reports usage on every stream whether asked or not. `http-referer` and `x-title` name the application to
OpenRouter: set them in the configuration's `headers` if you want attribution.
"""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="openrouter",
    base_url="https://openrouter.ai/api/v1",
    key_env="OPENROUTER_API_KEY",
    base_url_env="OPENROUTER_BASE_URL",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES),
    prices="openrouter",
    forwards=frozenset({"anthropic-version", "anthropic-beta"}),
    docs="https://openrouter.ai/docs/api-reference/overview",
)
