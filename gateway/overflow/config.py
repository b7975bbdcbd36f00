"""What the operator says about the queue: the `queue` block of the configuration.

Owns its own settings; what its bodies, webhooks and doors want is in their files. Refuses to know how jobs run.
"""

from typing import Annotated, Literal

from pydantic import Field

from backends.config import BlankIsNone
from backends.local_path import LocalPath
from gateway.overflow.batches import BatchesConfig
from gateway.overflow.bodies import EncryptionConfig
from gateway.overflow.endpoints import QueueWebhooksConfig
from gateway.overflow.shelf import FilesConfig
from local_engine.config import RESTART, Section

_WEEK_S = 604_800.0


class HoldConfig(Section):
    """Ordinary requests that wait as jobs, where a model's `on_full` is `hold`."""

    hold_s: float = Field(default=45.0, gt=0, le=3600)
    """How long one waits on its connection. Then 503 and `Retry-After`; sending it again takes up the same job. Below the
    idle time-outs of proxies on the way (60 s mostly), for nothing can be said meanwhile that leaves the status open."""
    attach_s: float = Field(default=120.0, ge=1, le=3600)
    """How long after `hold_s` the job goes on for a caller who has not come back yet; then it expires, unpaid."""
    keepalive_s: float = Field(default=15.0, ge=1, le=600)
    """A held stream that has begun and is silent for so long gets a comment."""


class TenantConfig(Section):
    """What one tenant (an organisation, a team, or a key without either) may have in the queue."""

    queued_jobs: int = Field(default=200_000, ge=0)
    """Jobs that wait; more are refused with 429. 0: any number."""
    queued_bytes: int = Field(default=4_294_967_296, ge=0)
    """Their bodies together. 0: any number."""
    weights: dict[str, float] = Field(default_factory=dict)
    """By tenant, its share of the service beside others that wait; 1 if not given."""


class QueueConfig(Section):
    """The queue: requests that are answered later, when there is room."""

    enabled: bool = Field(default=False, json_schema_extra=RESTART)
    """Whether there is one."""
    store: Literal["auto", "sqlite", "redis"] = Field(default="auto", json_schema_extra=RESTART)
    """Where jobs are kept: `sqlite`, this machine's data folder; `redis`, for several nodes; `auto`: Redis where
    `storage.redis` is set."""
    expires_s: float = Field(default=86_400.0, ge=60, le=_WEEK_S)
    """A job that nobody could run in so long expires, unless it says otherwise itself."""
    result_s: float = Field(default=86_400.0, ge=3600, le=_WEEK_S)
    """How long a result is kept, unless the job says otherwise."""
    result_bytes: int = Field(default=16_777_216, ge=65_536, json_schema_extra=RESTART)
    """A larger answer ends its job as failed."""
    result_folder: Annotated[LocalPath | None, BlankIsNone] = Field(default=None, json_schema_extra=RESTART)
    """Where results are that are too large for the database (4 MiB, compressed); null: in the database all the same."""
    replicas: int = Field(default=0, ge=0, le=16, json_schema_extra=RESTART)
    """How many replicas of Redis must have a job before it is accepted; a second without them is a 503."""
    attempts: int = Field(default=5, ge=1, le=20)
    """Tries of a job that fails through no fault of its own; then it is dead, and an operator may replay it."""
    reserve: float = Field(default=0.07, ge=0, lt=1)
    """Share of each endpoint's slots, and of a provider's rates, that jobs leave free; of slots one at least."""
    running: int = Field(default=256, ge=1, le=65_536)
    """Jobs that run at once in one worker for one pool, at most; how many it really is is learned."""
    trickle_s: float = Field(default=30.0, gt=0)
    """However busy a pool is, one job starts there in so long."""
    tenants: TenantConfig = TenantConfig()
    hold: HoldConfig = HoldConfig()
    files: FilesConfig = FilesConfig()
    batches: BatchesConfig = BatchesConfig()
    webhooks: QueueWebhooksConfig = QueueWebhooksConfig()
    encryption: EncryptionConfig = EncryptionConfig()
