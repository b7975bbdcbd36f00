"""A pool's settings for how its endpoints are chosen among, and when they are full.

Names the policies; what they do is in `policies.placement`.
"""

from importlib.util import find_spec
from typing import Literal

from pydantic import Field, model_validator

from local_engine.config import Section

PolicyName = Literal["session", "prefix", "least-loaded", "round-robin", "weighted"]


class PlacementConfig(Section):
    """How a request's endpoint is chosen. Matters where there is more than one, except for what `full` means."""

    policy: PolicyName = "session"
    """`session`: a conversation stays where its cache is. `prefix`: also what only begins alike. `least-loaded`,
    `round-robin`, `weighted`: without regard to caches."""
    bounded_load: float = Field(default=1.25, ge=1.0)
    """How many times its share of the pool's requests an endpoint gets before sessions overflow to their next one."""
    bounded_load_floor: int = Field(default=16, ge=1)
    """With fewer requests than this an endpoint is never above its share: chance alone moves nobody."""
    spill_s: float = Field(default=2.0, ge=0)
    """`prefix`: how much later the first token may come at a warm endpoint than at the best other one."""
    prefill_tokens_per_s: float = Field(default=10_000.0, gt=0)
    """`prefix`: prompt tokens that one engine computes in a second."""
    remembered_sessions: int = Field(default=16_384, ge=16)
    """Sessions whose last endpoint a worker remembers, for each model, to tell whether they were kept."""
    remembered_prefixes: int = Field(default=16_384, ge=16)
    """`prefix`: beginnings of prompts that a worker remembers, for each endpoint and model."""
    kv_events: bool = False
    """`prefix`: follow the engines' KV events, so that what their caches hold is known and not guessed. Each prompt is then
    turned to tokens by an engine before it is placed (docs/engine.md). Needs `pip install 'headgate[kv-events]'`."""
    tokenize_timeout_s: float = Field(default=0.25, gt=0)
    """`kv_events`: how long a prompt may wait for its tokens; after that its caches are guessed at."""
    max_in_flight: int = Field(default=0, ge=0)
    """Requests that make an endpoint full, from all workers together; 0: no limit."""
    max_waiting: int = Field(default=5, ge=0)
    """Requests in the engine's own queue that make it full, where that is known; 0: not looked at."""

    @model_validator(mode="after")
    def _can_follow(self) -> "PlacementConfig":
        if self.kv_events and self.policy != "prefix":
            raise ValueError("kv_events is for the policy prefix; the others do not look at caches")
        if self.kv_events and find_spec("zmq") is None:
            raise ValueError("kv_events needs pyzmq: pip install 'headgate[kv-events]'")
        return self
