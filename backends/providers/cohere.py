"""Cohere through its compatibility API."""

from backends.dialect import CHAT, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="cohere",
    base_url="https://api.cohere.ai/compatibility/v1",
    key_env="COHERE_API_KEY",
    base_url_env="COHERE_BASE_URL",
    paths=paths(CHAT, EMBEDDINGS),
    prices="cohere",
    docs="https://docs.cohere.com/docs/compatibility-api",
)
