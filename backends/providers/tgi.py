"""Text Generation Inference, and what speaks like it: the engine of a pool. It embeds nothing, and tells of no cached tokens."""

from backends.dialect import CHAT, COMPLETIONS
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="tgi",
    base_url="",
    paths=paths(CHAT, COMPLETIONS),
    forwards=frozenset({"traceparent", "tracestate"}),
    health_path="/health",
    metrics_path="/metrics",
    docs="https://huggingface.co/docs/text-generation-inference/reference/api_reference",
)
