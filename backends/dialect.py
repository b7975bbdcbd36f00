"""The wire formats a client may speak, as data.

A dialect is one request and answer format: its path, its family (whose error envelope it uses), whether its
answers may stream and carry usage. Nothing here encodes or decodes.
"""

from dataclasses import dataclass
from typing import Final, Literal

Family = Literal["openai", "anthropic"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """`path` is where clients post it; `default_upstream_path` goes after a provider's base URL."""

    name: str
    path: str
    default_upstream_path: str
    family: Family = "openai"
    is_billed: bool = True
    # Chat and legacy completions report usage on a stream only if asked (stream_options.include_usage).
    usage_on_request: bool = False


CHAT: Final = Dialect("chat", "/v1/chat/completions", "/chat/completions", usage_on_request=True)
COMPLETIONS: Final = Dialect("completions", "/v1/completions", "/completions", usage_on_request=True)
EMBEDDINGS: Final = Dialect("embeddings", "/v1/embeddings", "/embeddings")
RESPONSES: Final = Dialect("responses", "/v1/responses", "/responses")
MESSAGES: Final = Dialect("messages", "/v1/messages", "/messages", family="anthropic")
COUNT_TOKENS: Final = Dialect(
    "count_tokens", "/v1/messages/count_tokens", "/messages/count_tokens", family="anthropic", is_billed=False
)

DIALECTS: Final[dict[str, Dialect]] = {
    d.name: d for d in (CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, COUNT_TOKENS)
}
# Raw passthrough: the provider's own paths, nothing read but usage where the format is known.
RAW: Final = Dialect("raw", "", "")
