"""Which endpoint made an answer that a later request continues by its id (`previous_response_id`).

Engines keep such answers in their own memory, so the request must go where the answer was made. A bounded memory of
one process; who looks further when it does not know is not decided here. Ids are scoped to the tenant: nobody finds
another's answer, or learns where it is.
"""

from typing import NamedTuple

from policies.exchange import Caller, Exchange


class Origin(NamedTuple):
    """`endpoint` by name; `session` is the conversation's, 0 if it has none."""

    endpoint: str
    session: int


class Origins:
    """The answers made last, the oldest forgotten first."""

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._origins: dict[tuple[int, str], Origin] = {}

    def find(self, caller: Caller, answer_id: str) -> Origin | None:
        return self._origins.get((caller.scope, answer_id))

    def learn(self, exchange: Exchange) -> None:
        """An answer has been made, and has a name."""
        caller, candidate = exchange.caller, exchange.candidate
        if caller is not None and candidate is not None and exchange.answer_id:
            self.put(caller, exchange.answer_id, Origin(candidate.endpoint.name, exchange.session_hash))

    def put(self, caller: Caller, answer_id: str, origin: Origin) -> None:
        self._origins[caller.scope, answer_id] = origin
        if len(self._origins) > self._capacity:
            del self._origins[next(iter(self._origins))]
