"""The discrete-event simulation: conversations, gateway processes that place by the product's own code, and replicas.

Owns simulated time, who is told of what when, and what is written down of every request. A gateway process is
EndpointLoads and a Placer, driven as the gateway drives them: rank, Hold, dispatched, prefilled, finished, release; it
scrapes its engines once a second. A conversation is a closed loop: a turn comes when the one before it is answered.
"""

from __future__ import annotations

import heapq
import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from backends.load import EndpointLoad
from backends.placement_config import PlacementConfig
from bench.routing.replica import Job, Replica
from bench.routing.traces import BYTES_PER_TOKEN, Conversation
from local_engine.simulator.engine import EngineSettings
from policies.placement.ask import BEGINNINGS_BYTES, PREFIX_CAP_BYTES, Ask
from policies.placement.hold import Hold
from policies.placement.placer import Placer
from policies.placement.saturation import has_room

SCRAPE_S, FRESH_S = 1.0, 3.0
SAMPLE_S = 0.5
# As `policies.placement.prompt` cuts them.


@dataclass(slots=True)
class Record:
    """What is kept of the requests that came in the measured time, in columns."""

    at_s: array[float] = field(default_factory=lambda: array("d"))
    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    total_s: array[float] = field(default_factory=lambda: array("d"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("l"))
    cached_tokens: array[int] = field(default_factory=lambda: array("l"))
    output_tokens: array[int] = field(default_factory=lambda: array("l"))
    conversation: array[int] = field(default_factory=lambda: array("l"))
    replica: array[int] = field(default_factory=lambda: array("l"))
    imbalance: array[float] = field(default_factory=lambda: array("d"))  # max/mean in flight, sampled
    mean_in_flight: list[float] = field(default_factory=list)  # of each replica, over the measured time
    busy_s: list[float] = field(default_factory=list)
    computed_tokens: list[int] = field(default_factory=list)
    preemptions: int = 0
    refused: int = 0  # by an engine's queue limit, and sent again
    waited: int = 0  # for room at any endpoint
    moved: int = 0  # turns that went elsewhere than the turn before them
    continued: int = 0  # turns that had one before them
    reasons: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


class _Process:
    """One gateway process."""

    __slots__ = ("endpoints", "out", "placer", "waiting")

    def __init__(self, placer: Placer) -> None:
        self.placer = placer
        self.endpoints: list[EndpointLoad] = []
        self.out: dict[int, EndpointLoad] = {}  # removed, by the replica's number
        self.waiting: deque[_Request] = deque()


class _Request:
    """One turn under way."""

    __slots__ = ("arrived_at", "ask", "conversation", "endpoint", "hold", "job", "process", "replica", "turn")

    def __init__(self, conversation: Conversation, turn: int, arrived_at: float, process: _Process) -> None:
        self.conversation = conversation
        self.turn = turn
        self.arrived_at = arrived_at
        self.process = process
        self.ask: Ask
        self.job: Job
        self.endpoint: EndpointLoad
        self.replica: Replica
        self.hold: Hold


class Simulation:
    """A pool of replicas behind gateway processes that each have a placer of their own."""

    def __init__(
        self,
        engine: EngineSettings,
        replicas: int,
        make_placer: Callable[[], Placer],
        *,
        processes: int = 1,
        max_in_flight: int = 0,
        heeds_room: bool = True,
    ) -> None:
        """`heeds_room`: full replicas are passed over, and waited for when all are full, as the gateway does."""
        self._engine = engine
        self._heeds_room = heeds_room
        self._processes = [_Process(make_placer()) for _ in range(processes)]
        self._max_in_flight = max_in_flight
        self._random = random.Random(0)
        self._heap: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._order = count()
        self._contexts: dict[int, int] = {}  # tokens said so far, by conversation
        self._last: dict[int, Replica] = {}
        self._in_flight: list[int] = []
        self._area: list[float] = []
        self._changed_at: list[float] = []
        self._from_s = self._until_s = 0.0
        self._source: Iterator[Conversation] = iter(())
        self._is_population = False
        self._periodic = 1  # events in the heap that only follow themselves, but for the one being handled
        self.replicas: list[Replica] = []
        self.everyone: list[Replica] = []  # those that are gone too
        self.record = Record()
        self.decisions = 0
        for _ in range(replicas):
            self.add_replica()

    def add_replica(self) -> Replica:
        replica = Replica(self._engine, len(self.everyone))
        self.everyone.append(replica)
        self.replicas.append(replica)
        for column in (self._area, self._changed_at):
            column.append(0.0)
        self._in_flight.append(0)
        for process in self._processes:
            endpoint = EndpointLoad(
                f"pool/{replica.number}",
                f"http://10.0.0.{replica.number}:8000/v1".encode(),
                max_in_flight=self._max_in_flight,
                max_waiting=PlacementConfig().max_waiting,
                processes=len(self._processes),
            )
            process.endpoints = [*process.endpoints, endpoint]
        return replica

    def remove_replica(self, replica: Replica) -> None:
        """It gets nothing new; what it has, it finishes."""
        index = self.replicas.index(replica)
        del self.replicas[index]
        for process in self._processes:
            out = process.endpoints[index]
            process.endpoints = [endpoint for endpoint in process.endpoints if endpoint is not out]
            process.out[replica.number] = out

    def return_replica(self, replica: Replica) -> None:
        """The one that was removed is back, its cache as it was."""
        self.replicas.append(replica)
        for process in self._processes:
            process.endpoints = [*process.endpoints, process.out.pop(replica.number)]

    def join(self, conversation: Conversation, now: float) -> None:
        """Begins a conversation beside those of the run."""
        self._at(now + conversation.turns[0].wait_s, self._turn, (conversation, 0))

    def crash_replica(self, replica: Replica, now: float) -> None:
        """What it had is sent again elsewhere; it is back at once, with a cold cache."""
        for job in replica.fail(now):
            request = job.origin
            assert isinstance(request, _Request)
            self._let_go(request, now)
            self._place(request, now)

    def run(
        self,
        conversations: Iterable[Conversation],
        *,
        until_s: float,
        from_s: float = 0.0,
        population: int = 0,
        changes: Sequence[tuple[float, Callable[[Simulation, float], None]]] = (),
    ) -> Record:
        """Plays `until_s` seconds, then lets what is under way finish; what came from `from_s` on is recorded.

        With `population` so many conversations are under way at any time, one following another (their own `at_s` does
        not count); they begin over the first half of the time that is not recorded.
        """
        self._from_s, self._until_s = from_s, until_s
        self._source = iter(conversations)
        self._is_population = bool(population)
        for number in range(population):
            self._follow(from_s / 2 * number / population)
        if not population:
            for conversation in self._source:
                self._at(conversation.at_s, self._turn, (conversation, 0))
        for at_s, change in changes:
            self._at(at_s, self._change, change)
        self._periodic = 1
        self._at(SCRAPE_S, self._scrape, None)
        self._at(from_s, self._start_recording, None)
        heap, pop = self._heap, heapq.heappop
        now = 0.0
        while heap:
            now, _, handle, detail = pop(heap)
            handle(detail, now)
        return self._finished(now)

    def _at(self, at: float, handle: Callable[[Any, float], None], detail: object) -> None:
        heapq.heappush(self._heap, (at, next(self._order), handle, detail))

    def _follow(self, at: float) -> None:
        """The next conversation of the source begins."""
        conversation = next(self._source, None)
        if conversation is not None:
            self._at(at + conversation.turns[0].wait_s, self._turn, (conversation, 0))

    def _change(self, change: Callable[[Simulation, float], None], now: float) -> None:
        change(self, now)

    def _turn(self, what: tuple[Conversation, int], now: float) -> None:
        conversation, number = what
        if now >= self._until_s or now >= conversation.ends_s:
            return
        turn = conversation.turns[number]
        process = self._processes[
            self._random.randrange(len(self._processes)) if len(self._processes) > 1 else 0
        ]
        request = _Request(conversation, number, now, process)
        tokens = self._contexts.get(conversation.number, 0) + turn.added_tokens
        whole = tokens + turn.output_tokens
        self._contexts[conversation.number] = whole
        request.job = Job(
            tokens, turn.output_tokens, conversation.blocks(whole, self._engine.block_size), request
        )
        request.ask = ask_of(conversation, tokens, process.placer)
        self._place(request, now)

    def _place(self, request: _Request, now: float) -> None:
        process = request.process
        everyone = process.endpoints
        ranking = process.placer.rank(everyone, everyone, request.ask, now)
        ordered, reason = ranking.endpoints, str(ranking.reason)
        self.decisions += 1
        if self._heeds_room and not has_room(ordered[0], now):
            ordered, reason = [endpoint for endpoint in ordered if has_room(endpoint, now)], "full"
            if not ordered:
                self.record.waited += 1
                process.waiting.append(request)
                return
        for endpoint in ordered:
            replica = self.replicas[everyone.index(endpoint)]
            was_idle_until = replica.next_at
            if replica.submit(request.job, now):
                break
            self.record.refused += 1
        else:
            process.waiting.append(request)
            return
        uncached = request.ask.prompt_tokens - process.placer.cached_tokens(endpoint, request.ask)
        request.endpoint, request.replica, request.hold = endpoint, replica, Hold(endpoint, max(0, uncached))
        process.placer.dispatched(endpoint, request.ask, now)
        self._count(replica, 1, now)
        if replica.next_at != was_idle_until:
            self._at(replica.next_at or now, self._advance, replica)
        if now >= self._from_s:
            self._note(request, reason)

    def _note(self, request: _Request, reason: str) -> None:
        record = self.record
        record.reasons[reason] = record.reasons.get(reason, 0) + 1
        number = request.conversation.number
        last = self._last.get(number)
        if last is not None:
            record.continued += 1
            record.moved += last is not request.replica
        self._last[number] = request.replica

    def _advance(self, replica: Replica, now: float) -> None:
        if replica.next_at != now:
            return  # a run was cut, or the replica died
        for job in replica.advance(now):
            request = job.origin
            assert isinstance(request, _Request)
            if job.first_token_at == now:
                request.hold.prefilled()
            if job.is_finished:
                self._finish(request, job, now)
        if replica.next_at is not None:
            self._at(replica.next_at, self._advance, replica)

    def _finish(self, request: _Request, job: Job, now: float) -> None:
        process, conversation = request.process, request.conversation
        process.placer.finished(request.endpoint, request.ask, job.prompt_tokens, job.output_tokens)
        self._let_go(request, now)
        if request.arrived_at >= self._from_s:
            record = self.record
            assert job.first_token_at is not None
            record.at_s.append(request.arrived_at)
            record.replica.append(request.replica.number)
            record.ttft_s.append(job.first_token_at - request.arrived_at)
            record.total_s.append(now - request.arrived_at)
            record.prompt_tokens.append(job.prompt_tokens)
            record.cached_tokens.append(job.cached_tokens)
            record.output_tokens.append(job.output_tokens)
            record.conversation.append(conversation.number)
        following = request.turn + 1
        if following < len(conversation.turns):
            self._at(now + conversation.turns[following].wait_s, self._turn, (conversation, following))
        else:
            self._contexts.pop(conversation.number, None)
            self._last.pop(conversation.number, None)
            if self._is_population and now < self._until_s:
                self._follow(now)

    def _let_go(self, request: _Request, now: float) -> None:
        request.hold.release()
        self._count(request.replica, -1, now)
        waiting = request.process.waiting
        if waiting:
            self._at(now, self._place, waiting.popleft())

    def _count(self, replica: Replica, change: int, now: float) -> None:
        number = replica.number
        since = max(self._changed_at[number], self._from_s)
        if now > since:
            self._area[number] += self._in_flight[number] * (
                min(now, self._until_s) - min(since, self._until_s)
            )
        self._changed_at[number] = now
        self._in_flight[number] += change

    def _scrape(self, _: None, now: float) -> None:
        for process in self._processes:
            for endpoint, replica in zip(process.endpoints, self.replicas, strict=True):
                endpoint.running, endpoint.waiting = len(replica.running), len(replica.waiting)
                endpoint.kv_usage = replica.kv_usage
                endpoint.scraped_at, endpoint.fresh_until = now, now + FRESH_S
                endpoint.in_flight_at_scrape = endpoint.in_flight
            if process.waiting:
                self._at(now, self._place, process.waiting.popleft())
        if len(self._heap) > self._periodic:
            self._at(now + SCRAPE_S, self._scrape, None)
        else:
            self._periodic -= 1

    def _start_recording(self, _: None, now: float) -> None:
        for replica in self.everyone:
            replica.busy_s, replica.computed_tokens, replica.preemptions = 0.0, 0, 0
        self.record.moved = self.record.continued = 0
        self._sample(None, now)

    def _sample(self, _: None, now: float) -> None:
        loads = [self._in_flight[replica.number] for replica in self.replicas]
        mean = sum(loads) / len(loads)
        if mean:
            self.record.imbalance.append(max(loads) / mean)
        if now + SAMPLE_S < self._until_s and len(self._heap) > self._periodic:
            self._at(now + SAMPLE_S, self._sample, None)
        else:
            self._periodic -= 1

    def _finished(self, now: float) -> Record:
        record = self.record
        record.seconds = self._until_s - self._from_s
        for replica in self.everyone:
            self._count(replica, 0, max(now, self._until_s))
        record.mean_in_flight = [area / record.seconds for area in self._area]
        record.busy_s = [replica.busy_s for replica in self.everyone]
        record.computed_tokens = [replica.computed_tokens for replica in self.everyone]
        record.preemptions = sum(replica.preemptions for replica in self.everyone)
        return record

    def loads_left(self) -> int:
        """What the gateway processes still count; 0 when nothing is under way."""
        return sum(e.in_flight + e.uncached_tokens for process in self._processes for e in process.endpoints)


def ask_of(conversation: Conversation, tokens: int, placer: Placer) -> Ask:
    """What the gateway would know of the request: a named session, or else one recognised by the prompt's beginning."""
    size_bytes = tokens * BYTES_PER_TOKEN
    is_named = conversation.has_session
    session = 0
    if is_named:
        session = hash((conversation.session, 0x5E55)) & 0xFFFFFFFFFFFFFFFF or 1
    elif placer.wants_session:
        session = conversation.beginning(min(size_bytes, conversation.recognised_by_bytes)) or 1
    ask = Ask(
        session=session,
        is_derived=not is_named and session != 0,
        prompt_bytes=size_bytes,
        prompt_tokens=tokens,
    )
    if placer.wants_prefixes_of(ask):
        cuts = tuple(cut for cut in BEGINNINGS_BYTES if cut <= min(size_bytes, PREFIX_CAP_BYTES))
        ask.prefixes, ask.prefix_bytes = tuple(map(conversation.beginning, cuts)), cuts
    return ask
