"""The one record that travels with a request.

Stages write to it, policies read it, `settle` turns it into a ledger row. It holds no HTTP objects: the
policies must be able to judge an Exchange that `headgate explain` made up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from backends.adapter import Edits
from backends.dialect import Dialect
from backends.json_object import JsonObject
from backends.usage import Usage
from policies.caller import Caller
from policies.health.endpoint import Attempt
from policies.placement.ask import Ask
from policies.placement.conversations import Known
from policies.placement.hold import Hold
from policies.placement.priority import DEFAULT
from policies.waste import Waste

__all__ = ["Caller", "Ended", "Exchange", "OnFull"]

if TYPE_CHECKING:
    from policies.limits.holding import Reservation
    from policies.prices import Price
    from policies.routing import Candidate, Model, Target

# What is to happen when every endpoint is full: the client's word, or the rules'. "": the gateway's default order.
OnFull = Literal["", "wait", "fallback", "queue", "reject"]

# How a request ended; exactly one per request.
Ended = Literal[
    "completed",  # the whole answer of the upstream was relayed, whatever its status
    "denied",  # a policy of ours said no, nothing was sent
    "replayed",  # a repetition, answered with the kept answer to the first
    "parked",  # it became a job of the queue, whose row has what it cost; answered 202, or with the job's answer
    "invalid",  # the request itself was refused (400, 404, 413, ...)
    "client_gone",  # the client closed the connection
    "upstream_failed",  # no usable answer from any candidate
    "incomplete",  # the upstream's answer broke off, or said `error`, inside a stream
    "drained",  # cut by our own shutdown after the drain timeout
    "interrupted",  # the worker died; written by whoever found the intent
    "failed",  # a bug of ours (500)
]


@dataclass(slots=True, eq=False)
class Exchange:
    """One request's life. Fields are grouped by the stage that sets them; `_at` is `time.perf_counter()`.

    Slots, because they are written some fifty times per request: the attributes of a Struct take five times as long to set.
    """

    request_id: str
    dialect: Dialect
    received_at: float
    received_time: float  # wall clock, seconds
    # identify
    caller: Caller | None = None
    tags: tuple[str, ...] = ()
    is_async: bool = False  # through the queue: at the model's price for that
    is_batch: bool = False  # of the queue's class `batch`: behind all others inside an engine
    is_shadow: bool = False  # a copy of another request: nobody waits for its answer, no caller pays
    # read
    read_at: float = 0.0
    body_bytes: int = 0
    model_name: str = ""  # as the client wrote it
    model: "Model | None" = None
    is_stream: bool = False
    max_tokens: int | None = None
    end_user: str = ""  # `{tenant}/{id}`; "": not said, or not by somebody who is trusted
    choices: int = 1  # answers asked for (`n`)
    session_hash: int = 0  # 64 bits, keyed by tenant; 0: no session
    document: JsonObject | None = None  # the body, its members undecoded; None: a passthrough request
    headers: Mapping[bytes, bytes] | None = None  # the client's, by lower-case name
    on_full: OnFull = ""
    priority: int = DEFAULT  # place in policies.placement.priority.PRIORITIES
    ceiling: float = 1.0  # saturation at which an endpoint is full for this priority
    continues: str = ""  # id of the answer that this one continues: it goes where that was made
    pinned_to: str = ""  # name of that endpoint
    is_affine: bool = True  # the client did not opt out of being kept where its cache is
    # admit
    targets: "tuple[Target, ...] | None" = None  # instead of the model's own, in order of preference
    edits: Edits | None = None  # what is changed in the body
    fallen_from: "tuple[Model, ...]" = ()  # models that could not answer, the first one first
    taken: "Sequence[Reservation]" = ()  # what limits reserved for it; settle gives it back
    lacks: "Sequence[Reservation]" = ()  # what must be asked for elsewhere before it may go on
    # place
    ask: Ask | None = None
    ask_target: "Target | None" = None  # whose ask it is: pools count tokens and salt caches differently
    known: Known | None = None  # the prompt in tokens, where a pool's caches are known by them
    session_state: str = "none"  # kept | moved | new | none
    place_reason: str = ""  # why it went where it was sent (policies.placement.placer.Reason)
    predicted_cached_tokens: int | None = None  # None: nothing was predicted
    waited_s: float = 0.0  # for room
    # send
    candidate: "Candidate | None" = None  # of the latest attempt
    hold: Hold | None = None  # the load it is counted with at the candidate's endpoint
    attempt: Attempt | None = None  # the latest, for the health of its endpoint
    attempts: int = 0
    sent_at: float = 0.0  # the latest attempt
    waste: list[Waste] | None = None  # attempts that failed
    prefilled_by: str = ""  # name of the endpoint that computed the prompt, where that is another one
    prefill_us: int = 0
    dispatched_at: float = 0.0
    intent: tuple[Any, ...] | None = None  # what the ledger wrote of it when it was first sent off
    upstream_headers: Sequence[tuple[bytes, bytes]] = ()  # of the answer to a run of a job
    # relay
    first_byte_at: float = 0.0  # head of the answer seen
    ready_at: float = (
        0.0  # what is relayed first was in hand: the first piece of a stream, else the whole body
    )
    relayed_at: float = 0.0  # first byte of the answer handed to the client's socket
    status: int = 0
    served_model: str = ""  # as the upstream named it
    service_tier: str = ""  # as the upstream answered it
    answer_id: str = ""  # the upstream's name of an answer that a later request may continue (Responses)
    usage: Usage | None = None
    is_estimated: bool = False
    # settle
    ended: Ended = "failed"
    error_kind: str = ""
    ended_at: float = 0.0
    overhead_s: float = 0.0  # of this the gateway's own time
    price: "Price | None" = None
    cost_nanousd: int | None = None  # None: the price or the usage is unknown
    saved_nanousd: int | None = None  # what a cache took off the cost
    on_priced: "Callable[[], None] | None" = None  # a run of a job: who has it ends it, not `settle`

    def end(self, now: float) -> None:
        """The gateway's own time is body read to dispatched, plus answer in hand to handed on. Waiting is not ours."""
        self.ended_at = now
        own_s = self.dispatched_at - self.read_at - self.waited_s if self.dispatched_at else 0.0
        self.overhead_s = own_s + self.relayed_at - self.ready_at if self.relayed_at else own_s
