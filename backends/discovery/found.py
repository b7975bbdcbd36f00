"""What a source of endpoints found, and how it becomes a pool's members.

Invariants: a member's name follows from its key alone, so that it is the same when it leaves and returns, in every process;
it does not show an address.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

import xxhash

from backends.member import Member, Role

MOST: Final = 4096  # of one pool
_DIGITS: Final = 6


class DiscoveryError(Exception):
    """The source could not be asked, or its answer not be used. A sentence for the operator."""


class Found(NamedTuple):
    """One address. `key` is what it is known by, whatever its address; `name` is the operator's, if any."""

    key: str
    url: str
    role: Role = "both"
    weight: float = 1.0
    ranks: int = 1
    is_open: bool = True
    name: str = ""


def members_of(pool: str, found: Sequence[Found]) -> tuple[Member, ...]:
    """In the order of their keys, each rank one of its own. What is found twice counts once."""
    by_key = {each.key: each for each in sorted(found, reverse=True)}
    names: dict[str, str] = {}
    taken: set[str] = set()
    for each in sorted(by_key.values()):
        name = each.name or _name(each.key, taken)
        taken.add(name)
        names[each.key] = f"{pool}/{name}"
    return tuple(
        Member(
            name=names[each.key] if each.ranks == 1 else f"{names[each.key]}.r{rank}",
            base_url=each.url,
            rank=rank if each.ranks > 1 else None,
            engine=str(rank) if each.ranks > 1 else "",
            role=each.role,
            weight=each.weight,
            is_open=each.is_open,
        )
        for each in sorted(by_key.values())
        for rank in range(each.ranks)
    )


def _name(key: str, taken: set[str]) -> str:
    digest = xxhash.xxh3_64_hexdigest(key.encode())
    return next(
        (digest[:length] for length in range(_DIGITS, len(digest)) if digest[:length] not in taken), digest
    )
