"""DeepSeek. One host for both families: OpenAI's paths without `/v1`, Anthropic's under `/anthropic`.

Both take the key as a bearer token. Completions are its beta of fill-in-the-middle.
"""

from backends.dialect import CHAT
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="deepseek",
    base_url="https://api.deepseek.com",
    key_env="DEEPSEEK_API_KEY",
    base_url_env="DEEPSEEK_BASE_URL",
    paths=paths(CHAT, completions="/beta/completions", messages="/anthropic/v1/messages"),
    prices="deepseek",
    forwards=frozenset({"anthropic-version", "anthropic-beta"}),
    docs="https://api-docs.deepseek.com",
)
