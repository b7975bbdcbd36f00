"""A provider as data: where it is, how it wants its key, what it speaks, what it cannot bear.

An OpenAI-compatible provider is one `Provider` record in `backends/providers/` and one line in
`backends/registry.py`. Knows no connection and no caller.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS, Dialect

# Set by us on every upstream request; a provider's allow-list cannot let a client's own through.
_NEVER_FORWARDED: Final = frozenset(
    {"host", "authorization", "x-api-key", "api-key", "content-length", "transfer-encoding", "connection",
     "accept-encoding", "x-data-parallel-rank", "user-agent", "x-request-id", "cookie", "proxy-authorization", "expect", "te", "upgrade"}
)  # fmt: skip


Auth = Literal["bearer", "x-api-key", "api-key", "none"]


def paths(*dialects: Dialect, **overrides: str) -> dict[str, str]:
    """Dialect name -> path after the base URL; the usual paths unless overridden by keyword."""
    return {d.name: d.default_upstream_path for d in dialects} | overrides


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """Facts about one provider.

    `key_env` and `base_url_env` are the environment variables its own SDK reads; with the key set, the provider
    is enabled by itself. `prices` is its id in genai-prices (None: no public prices). `drops` are top-level
    request fields it answers with 400; `reserved` are those that only the gateway may say to it, and whatever is dropped,
    a client's are. `forwards` are client headers it may see, lower case; anything else of
    the client's never leaves the gateway.
    """

    name: str
    base_url: str
    key_env: str | None = None
    base_url_env: str | None = None
    auth: Auth = "bearer"
    paths: Mapping[str, str] = field(default_factory=lambda: paths(CHAT, COMPLETIONS, EMBEDDINGS))
    prices: str | None = None
    may_ask_usage: bool = True  # understands stream_options.include_usage
    drops: frozenset[str] = frozenset()
    reserved: frozenset[str] = frozenset()
    forwards: frozenset[str] = frozenset()
    headers: Mapping[str, str] = field(
        default_factory=dict
    )  # always sent, unless the client's forwarded one is there
    health_path: str | None = None  # answers 200 while the server lives, beside the API and not under it
    metrics_path: str | None = None  # vLLM's metrics, there too
    docs: str = ""

    def client_headers(self) -> tuple[tuple[bytes, bytes | None], ...]:
        """The client headers this provider may see, each with what is sent when the client has none."""
        return tuple(
            (name.encode(), self.headers[name].encode() if name in self.headers else None)
            for name in sorted(self.forwards - _NEVER_FORWARDED)
        )
