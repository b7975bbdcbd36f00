"""Which limits hold for whom: every limit there is, found by the scopes a request is in.

Immutable: a change makes another book. One rule where two have the same name at the same level: that of a named
scope comes before that of `*`.
"""

from collections.abc import Iterable, Iterator

from policies.exchange import Caller
from policies.limits.limit import EVERY, Level, Limit

Member = tuple[Limit, str]  # a limit, and who it is that it counts


class LimitBook:
    """All limits, by level and name."""

    def __init__(self, limits: Iterable[Limit] = ()) -> None:
        self._by_scope: dict[tuple[Level, str], dict[str, Limit]] = {}
        for limit in limits:
            scope = limit.scope
            self._by_scope.setdefault((scope.level, scope.name), {})[limit.name] = limit
        levels = {level for level, _ in self._by_scope}
        self.has_end_users = "user" in levels
        self.has_tags = "tag" in levels

    def __len__(self) -> int:
        return sum(map(len, self._by_scope.values()))

    def __iter__(self) -> Iterator[Limit]:
        for limits in self._by_scope.values():
            yield from limits.values()

    def of_caller(self, caller: Caller, model_name: str) -> list[Member]:
        """What holds for all requests of this caller to this model, widest scope first."""
        found = self._at("org", caller.organisation)
        found += self._at("team", caller.team)
        found += self._at("key", caller.key_id, caller.name)
        found += self._at("model", model_name)
        return _counting(found, model_name)

    def of_end_user(self, end_user: str, model_name: str) -> list[Member]:
        """`end_user` as the Exchange has it, with its tenant."""
        return _counting(self._at("user", end_user), model_name)

    def of_tag(self, tag: str, model_name: str) -> list[Member]:
        return _counting(self._at("tag", tag), model_name)

    def _at(self, level: Level, member: str, alias: str = "") -> list[Member]:
        """The limits of one member of a level; `alias` is another name the scope may call it by."""
        if not member:
            return []
        limits = dict(self._by_scope.get((level, EVERY), {}))
        if alias:
            limits.update(self._by_scope.get((level, alias), {}))
        limits.update(self._by_scope.get((level, member), {}))
        return [(limit, member) for limit in limits.values()]


def _counting(members: list[Member], model_name: str) -> list[Member]:
    return [member for member in members if _counts(member[0], model_name)]


def _counts(limit: Limit, model_name: str) -> bool:
    if limit.models is None or model_name in limit.models:
        return True
    return any(pattern.endswith("*") and model_name.startswith(pattern[:-1]) for pattern in limit.models)
