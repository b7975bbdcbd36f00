"""Azure OpenAI and Azure AI Foundry through the v1 API, which needs no `api-version`.

The base URL is the resource's own (`https://<resource>.openai.azure.com/openai/v1`), so it must be given. OpenAI's
models there take `prompt_cache_key`, Foundry's others answer 400; with only the former, set `drops` to
`[prompt_cache_retention]` to keep the cache hint.
"""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="azure-openai",
    base_url="",
    key_env="AZURE_OPENAI_API_KEY",
    base_url_env="AZURE_OPENAI_BASE_URL",
    auth="api-key",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES),
    prices="azure",
    # vectorize-io/hindsight#3518, OpenHands/software-agent-sdk#2295
    drops=frozenset({"prompt_cache_key", "prompt_cache_retention"}),
    docs="https://learn.microsoft.com/azure/foundry/openai/api-version-lifecycle",
)
