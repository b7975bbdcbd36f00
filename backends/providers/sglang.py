"""SGLang: the engine of a pool. Its metrics are there with `--enable-metrics`. It shares a prefix cache between all that ask."""

from backends.dialect import CHAT, COMPLETIONS, EMBEDDINGS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="sglang",
    base_url="",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS),
    forwards=frozenset({"traceparent", "tracestate"}),
    health_path="/health",
    metrics_path="/metrics",
    docs="https://docs.sglang.io/basic_usage/openai_api.html",
)
