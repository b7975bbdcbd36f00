"""Moonshot AI (Kimi). Knows `prompt_cache_key`, and wants it for multi-turn work.

Its Messages API is at another base (`https://api.moonshot.ai/anthropic`): configure that as a provider of its
own with `type: anthropic`, `auth: bearer`.
"""

from backends.dialect import CHAT, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="moonshot",
    base_url="https://api.moonshot.ai/v1",
    key_env="MOONSHOT_API_KEY",
    base_url_env="MOONSHOT_BASE_URL",
    paths=paths(CHAT, RESPONSES),
    prices="moonshotai",
    docs="https://platform.kimi.ai/docs/api/overview",
)
