"""xAI (Grok). Responses first; chat and completions are its legacy. Its Messages endpoint is deprecated: left out."""

from backends.dialect import CHAT, COMPLETIONS, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="xai",
    base_url="https://api.x.ai/v1",
    key_env="XAI_API_KEY",
    base_url_env="XAI_BASE_URL",
    paths=paths(CHAT, COMPLETIONS, RESPONSES),
    prices="x-ai",
    docs="https://docs.x.ai/docs/api-reference",
)
