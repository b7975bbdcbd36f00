"""llama.cpp's server: the engine of a pool. Its metrics are there with `--metrics`; `cached_tokens` are in its usage."""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="llamacpp",
    base_url="",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS),
    forwards=frozenset({"traceparent", "tracestate"}),
    health_path="/health",
    metrics_path="/metrics",
    docs="https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md",
)
