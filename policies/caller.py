"""Who asks. A module of its own, because it is hashed and built by msgspec's rules, which compiled classes lose (setup.py)."""

import msgspec
import xxhash

from policies.placement.priority import DEFAULT


class Caller(msgspec.Struct, frozen=True, eq=False):
    """Who asks: one key, its name, team and organisation, what it may use."""

    key_id: str
    name: str
    team: str = ""
    models: frozenset[str] | None = None  # None: every model; patterns may end in `*`
    expires_time: float | None = None  # wall clock, seconds
    tags: tuple[str, ...] = ()
    organisation: str = ""  # the team's
    priority: int = DEFAULT  # place in policies.placement.priority.PRIORITIES
    scope: int = 0  # of hashes that tenants must not share

    def __post_init__(self) -> None:
        scope = xxhash.xxh3_64_intdigest((self.team or self.key_id).encode())
        msgspec.structs.force_setattr(self, "scope", scope)

    @property
    def tenant(self) -> str:
        """Within which an end user's id means one person."""
        return self.organisation or self.team or self.key_id
