"""What an engine that schedules by priority is told of a request: its class, as the number that vLLM takes.

Owns the numbers, and that no client jumps the queue inside an engine by naming one itself. In vLLM a lower number runs
earlier, and a request that says nothing is 0 (`--scheduling-policy priority`; with any other policy it refuses all but
0, so nothing is said to a pool that does not schedule so). Of the class bulk are flex requests, jobs of the queue, and
keys that say so; inside an engine a batch's jobs are behind these, too.
"""

from typing import Final

from backends.adapter import Edits
from backends.pool import Pool
from policies.exchange import Exchange
from policies.placement.priority import DEFAULT

_STEP: Final = 10  # room for a rule's own numbers between two classes
_FIELD: Final = "priority"
# Dialects whose body has the field; vLLM's Anthropic requests take a header instead.
_BODIES: Final = frozenset({"chat", "completions", "responses", "embeddings"})
_BY_HEADER: Final = "messages"


def engine_priority(place: int, *, is_batch: bool = False) -> int:
    """Of the class at this place in `policies.placement.priority.PRIORITIES`: system -20, interactive -10, default 0, bulk 10,
    and 20 for a batch's jobs."""
    return _STEP * (place - DEFAULT + is_batch)


def prioritised(exchange: Exchange, edits: Edits | None, pool: Pool) -> Edits | None:
    """`edits`, and the request's class for an engine of this pool. A rule that sets `priority` has the last word."""
    document = exchange.document
    if not pool.priority or document is None or exchange.dialect.name not in _BODIES:
        return edits
    is_asked = _FIELD in document.values
    if (is_asked and pool.priority == "client") or (edits is not None and _FIELD in edits.sets):
        return edits
    number = engine_priority(exchange.priority, is_batch=exchange.is_batch)
    if not number and not is_asked:
        return edits  # what saying nothing means
    member = b'"%b":%d' % (_FIELD.encode(), number)
    if edits is None:
        return Edits(frozenset(), {_FIELD: member})
    return Edits(edits.drops - {_FIELD}, {**edits.sets, _FIELD: member}, edits.reserved)


def with_priority(head: bytes, exchange: Exchange, pool: Pool) -> bytes:
    """A request head with the class in it, where the body has no place for it."""
    if not pool.priority or exchange.dialect.name != _BY_HEADER:
        return head
    number = engine_priority(exchange.priority, is_batch=exchange.is_batch)
    return b"%bx-vllm-priority: %d\r\n\r\n" % (head.removesuffix(b"\r\n"), number)
