"""OpenAI itself. Its dialects are the reference; nothing is dropped.

`openai-organization` and `openai-project` choose the account that pays, so they are the operator's to set
(`headers` in the configuration), never the client's. `idempotency-key` is not forwarded either: its namespace is
the account, which all callers share, and a collision would hand one caller another's answer.
"""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="openai",
    base_url="https://api.openai.com/v1",
    key_env="OPENAI_API_KEY",
    base_url_env="OPENAI_BASE_URL",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES),
    prices="openai",
    forwards=frozenset({"openai-beta"}),
    docs="https://platform.openai.com/docs/api-reference",
)
