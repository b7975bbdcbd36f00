"""DeepInfra. Knows `prompt_cache_key` and `prompt_cache_options`. Not in the price data: give prices yourself."""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="deepinfra",
    base_url="https://api.deepinfra.com/v1/openai",
    key_env="DEEPINFRA_API_KEY",
    base_url_env="DEEPINFRA_BASE_URL",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS),
    docs="https://docs.deepinfra.com/api-reference/chat-completions/openai-chat-completions",
)
