"""Ollama on its own machine. It needs no key, so it is enabled only by being listed."""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="ollama",
    base_url="http://127.0.0.1:11434/v1",
    base_url_env="OLLAMA_BASE_URL",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES),
    docs="https://docs.ollama.com/api/openai-compatibility",
)
