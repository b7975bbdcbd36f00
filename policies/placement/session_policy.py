"""`session`: a conversation goes home, to the endpoint its hash names, unless home has more than its share.

Home is known without having seen the session before, in every process alike. Two bounds keep the load even: of
requests in flight, at once, and of recent requests, which tells how many sessions live where. A new session has no
cache to lose, so it is the first to make way; one that is away stays where its cache is now, until home has room
to spare. Requests that belong to no session go to the least loaded.
"""

from collections.abc import Sequence
from typing import Final

from backends.load import EndpointLoad
from policies.placement.ask import Ask
from policies.placement.placer import Placer, Ranking, Reason
from policies.placement.recent_share import RecentShare
from policies.placement.rendezvous import first_within_share, home, order, order_uniform, within_share
from policies.placement.spread import rotated, token_loads

# Of its share of recent requests: above the first, home takes no new session; below the second, it calls its own back.
_NEW: Final = 1.0
_CALLS_BACK: Final = 0.8


class SessionPlacer(Placer):
    """`bounded_load` times its share is what an endpoint takes; below `floor` requests it is never above."""

    name = "session"
    wants_session = True

    def __init__(self, remembered_sessions: int, bounded_load: float, floor: int) -> None:
        super().__init__(remembered_sessions)
        self._bounded_load = bounded_load
        self._floor = floor
        self._recent = RecentShare(floor)
        self._turn = 0
        self._pool: Sequence[EndpointLoad] = ()
        self._keys: list[bytes] | None = None  # of the pool, if all weigh the same

    def rank(
        self, endpoints: Sequence[EndpointLoad], everyone: Sequence[EndpointLoad], ask: Ask, now: float
    ) -> Ranking:
        session = ask.session
        if not session:
            loads = token_loads(endpoints, now)
            places = sorted(rotated(len(loads), self._turn), key=loads.__getitem__)
            return Ranking([endpoints[place] for place in places], "load")
        if everyone is not self._pool:
            self._learn(everyone)
        if endpoints is everyone and self._keys is not None:
            ordered = order_uniform(endpoints, self._keys, session)
        else:
            ordered = order(endpoints, session)
        first = ordered[0]
        stay = self.sessions.find(session)
        chosen = self._choose(ordered, stay.hash_key if stay is not None else None, now)
        reason: Reason = "home"
        if chosen is not first:
            ordered.remove(chosen)
            ordered.insert(0, chosen)
            reason = "home_over_share"
        if endpoints is not everyone and first is not home(everyone, session):
            reason = "home_out"
        return Ranking(ordered, reason)

    def dispatched(self, endpoint: EndpointLoad, ask: Ask, now: float) -> None:
        super().dispatched(endpoint, ask, now)
        self._turn += 1
        self._recent.add(endpoint, now)

    def _choose(self, ordered: Sequence[EndpointLoad], last_key: bytes | None, now: float) -> EndpointLoad:
        """`ordered` begins with the nearest to home; `last_key` is of where the session was last."""
        first = ordered[0]
        is_at_home = last_key == first.hash_key
        if is_at_home and not first.requests(now):
            return first  # however many live there, nobody is in its way
        share = self._recent.of(first, ordered, now)
        most = self._bounded_load if is_at_home else _NEW if last_key is None else _CALLS_BACK
        within = first_within_share(ordered, self._bounded_load, self._floor, now)
        if share <= most and within is first:
            return first
        candidates = within_share(ordered, self._bounded_load, self._floor, now)
        if last_key is not None and not is_at_home:
            last = next((e for e in candidates if e.hash_key == last_key), None)
            if last is not None and self._recent.of(last, ordered, now) <= self._bounded_load:
                return last
        shares = self._recent.of_each(candidates, now)
        place = next(
            (place for place, share in enumerate(shares) if share <= _NEW), shares.index(min(shares))
        )
        return candidates[place]

    def _learn(self, everyone: Sequence[EndpointLoad]) -> None:
        self._pool = everyone
        self._recent.keep(everyone)
        is_uniform = len({endpoint.weight for endpoint in everyone}) == 1
        self._keys = [endpoint.hash_key for endpoint in everyone] if is_uniform else None
