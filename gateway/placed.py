"""The configuration as a worker gets it: the operator's, and where the engines are that only the parent knows.

Owns nothing but the joining of the two. A pool that is named in `placed` has these members for endpoints.
Secrets are in it: it goes through the private channel only.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Self

from pydantic import Field

from backends.config import PoolSettings
from backends.member import Member
from gateway.config import Config
from local_engine.config import Section


class PlacedPool(Section):
    """A pool's members."""

    members: tuple[Member, ...]


class PlacedConfig(Config):
    """Valid as its Config was; `placed` is by the pool's name."""

    placed: dict[str, PlacedPool] = Field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, placed: Mapping[str, PlacedPool]) -> Self:
        """Pools that the configuration does not have, or has switched off, are left out."""
        values = {name: getattr(config, name) for name in Config.model_fields}
        known = {name: pool for name, pool in placed.items() if name in config.pools}
        return cls.model_construct(config.model_fields_set | {"placed"}, **values, placed=known)

    def enabled_pools(self) -> dict[str, PoolSettings]:
        return {
            name: replace(pool, members=self.placed[name].members) if name in self.placed else pool
            for name, pool in super().enabled_pools().items()
        }
