"""Perplexity. Usage comes with its streams unasked. Responses is its Agent API, chat its (older) Sonar API."""

from backends.dialect import CHAT
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="perplexity",
    base_url="https://api.perplexity.ai",
    key_env="PERPLEXITY_API_KEY",
    base_url_env="PERPLEXITY_BASE_URL",
    paths=paths(CHAT, responses="/v1/responses"),
    prices="perplexity",
    may_ask_usage=False,
    docs="https://docs.perplexity.ai/docs/agent-api/openai-compatibility",
)
