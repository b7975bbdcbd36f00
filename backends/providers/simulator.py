"""The built-in engine simulator: vLLM's surface, all dialects under `/v1`."""

from backends.dialect import CHAT, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, MESSAGES, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="simulator",
    base_url="",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, COUNT_TOKENS),
    forwards=frozenset({"traceparent", "tracestate", "x-session-id"}),
    reserved=frozenset({"kv_transfer_params"}),
    health_path="/health",
    metrics_path="/metrics",
    docs="https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html",
)
