"""What the operator says about the health of a provider's or pool's endpoints, and how an engine's load is learned.

Names the figures; what is concluded from them is in `policies.health`.
"""

from typing import Literal

from pydantic import Field

from backends.orca import Format
from local_engine.config import Section

ProbeName = Literal["generate", "health", "none"]
ScrapeName = Literal["metrics", "load", "none"]


class HealthConfig(Section):
    """When an endpoint is left out, and how it comes back. Never more than half of a pool's."""

    failures: int = Field(default=3, ge=0)
    """Failures in a row that take it out: 5xx, resets, timeouts, much slower than the others. A connection that cannot
    be made takes it out at once. 0: nothing does, and it is not let rest either when it asks for that."""
    eject_s: float = Field(default=10.0, gt=0)
    """How long it stays out; twice as long each further time."""
    eject_max_s: float = Field(default=300.0, gt=0)
    """The longest it stays out before it is tried again."""
    slow_start_s: float = Field(default=10.0, ge=0)
    """Over how long it gets its share of requests back."""
    slow_factor: float = Field(default=5.0, ge=0)
    """An answer that took this many times as long for its work as the pool's others take is a failure; 0: never."""
    stall_s: float = Field(default=1.0, ge=0)
    """Requests wait and it has not said a byte for so long, and for ten times what the others take: out. 0: never."""
    retry_share: float = Field(default=0.2, ge=0, le=1)
    """Requests sent again to another endpoint, at most so many for each request of the last ten seconds."""
    retry_floor: int = Field(default=3, ge=0)
    """Retries in ten seconds that are always there, however few requests."""
    probe: ProbeName | None = None
    """How it is tried before it gets requests again: `generate` (a request for one token), `health` (its health page), `none`
    (one live request). Not given: `generate` for engines (vLLM, SGLang, llama.cpp, TGI, simulators), `none` for others."""
    probe_every_s: float = Field(default=2.0, ge=0.05)
    """Between two probes of one that is out."""
    probe_timeout_s: float = Field(default=5.0, gt=0)
    """A probe that takes longer has failed."""
    scrape: ScrapeName | None = None
    """Where its load is read: `metrics` (an engine's page), `load` (vLLM's `/load`: requests only), `none`. Not given: `metrics` for
    engines, `none` for others."""
    load_header: Format | None = None
    """Also ask for it with some requests that are not streamed (ORCA's `endpoint-load-metrics`, in this form; vLLM knows both).
    Between two scrapes it is newer, and each question costs the engine as much as a scrape. Not given: no."""
    load_header_every_s: float = Field(default=0.25, gt=0)
    """How often a worker asks so. What is older than three times this is not believed."""
    scrape_every_s: float = Field(default=1.0, ge=0.05)
    """How often. What is older than three times this is not believed."""
