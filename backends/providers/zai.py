"""Z.AI (GLM), pay as you go.

The Coding Plan has other addresses: override the base URL with `https://api.z.ai/api/coding/paas/v4`. The Messages
API is at `https://api.z.ai/api/anthropic`: a provider of its own with `type: anthropic`, `auth: bearer`.
"""

from backends.dialect import CHAT
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="zai",
    base_url="https://api.z.ai/api/paas/v4",
    key_env="ZAI_API_KEY",
    base_url_env="ZAI_BASE_URL",
    paths=paths(CHAT),
    prices="zai",
    docs="https://docs.z.ai/guides/develop/openai/python",
)
