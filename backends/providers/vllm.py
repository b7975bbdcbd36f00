"""vLLM: the engine of a pool. All dialects are under `/v1`.

Trace context and the session id are for the operator's own telemetry and KV events, so a client's may pass.
`x-data-parallel-rank` and `x-vllm-priority` may not: placement and priority are the gateway's to decide.
So are `kv_transfer_params`: a client's could read what another's prompt left in a cache, and malformed ones end the engine
(0.32: `KeyError` in its scheduler).
"""

from backends.dialect import CHAT, COMPLETIONS, COUNT_TOKENS, EMBEDDINGS, MESSAGES, RESPONSES
from backends.provider import Provider, paths

PROVIDER = Provider(
    name="vllm",
    base_url="",
    paths=paths(CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, COUNT_TOKENS),
    forwards=frozenset({"traceparent", "tracestate", "x-session-id"}),
    reserved=frozenset({"kv_transfer_params"}),
    health_path="/health",
    metrics_path="/metrics",
    docs="https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html",
)
