"""A pool's settings for prompts that are computed by some of its engines and answered by others.

Names the figures; what they decide is in `policies.placement.prefill`, the two calls are `gateway.prefilling`'s.
"""

from pydantic import Field

from local_engine.config import Section


class PrefillConfig(Section):
    """Two calls for one request, where a pool has members with the role `prefill`: they compute prompts, the others answer."""

    least_tokens: int = Field(default=512, ge=0)
    """Tokens of a prompt that are expected in no cache of the engine that will answer: with fewer it computes them itself."""
    timeout_s: float = Field(default=30.0, gt=0)
    """A prompt that takes longer is computed again by the engine that answers."""
    lease_s: float = Field(default=30.0, gt=0)
    """How long a computed prompt is kept to be collected (vLLM's `kv_lease_duration`); what is older is not asked for."""
