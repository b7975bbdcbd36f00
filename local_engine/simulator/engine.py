"""The simulated engine: continuous batching over a prefix cache, one step after another.

Owns the waiting queue, the batch and the blocks; knows no clock, no asyncio and no text. The caller passes the time
in, learns from `begin_step` how long the step lasts, and calls `end_step` when that has gone by: in real time behind
a server, or at once in a discrete-event simulation. What a sequence says is its script's business.

Invariants: a sequence is waiting, running or finished; a running one holds blocks for every token computed, a
waiting or finished one holds none, unless it is lent; the timing of a prompt follows from the tokens that were neither
cached nor loaded from another engine.
"""

import bisect
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from local_engine.prefix_cache import Block, BlockHasher, BlockPool

FinishReason = Literal["stop", "length", "abort"]
QueueLimit = Literal["max_num_queued_reqs", "max_num_queued_tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What the engine can hold and how long its work takes (in model time, before any scaling)."""

    block_size: int = 16
    num_blocks: int = 8192
    max_num_seqs: int = 128
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    max_num_batched_tokens: int = 2048
    max_model_len: int = 32768
    prefill_overhead_us: float = 20_000.0
    prefill_us_per_token: float = 150.0
    decode_us_per_token: float = 10_000.0
    # A decode step of a full batch takes this many times one of a single sequence.
    load_factor: float = 2.0
    # What a decode step adds for every token of context it reads.
    kv_read_us_per_token: float = 0.0
    step_floor_us: float = 0.0

    def __post_init__(self) -> None:
        for name in ("block_size", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in self.__dataclass_fields__:
            if "_us" in name and getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"one sequence of max_model_len {self.max_model_len} needs "
                f"{-(-self.max_model_len // self.block_size)} blocks of {self.block_size} tokens, but num_blocks is "
                f"{self.num_blocks}: raise num_blocks or lower max_model_len"
            )

    def step_us(self, *, prefill_tokens: int, decodes: int, context_tokens: int, has_starts: bool) -> float:
        """How long a step of this work takes. `context_tokens`: what the decoding sequences read."""
        us = prefill_tokens * self.prefill_us_per_token
        if has_starts:
            us += self.prefill_overhead_us
        if decodes:
            load = (decodes - 1) / max(1, self.max_num_seqs - 1)
            us += self.decode_us_per_token * (1 + (self.load_factor - 1) * load)
            us += context_tokens * self.kv_read_us_per_token
        return max(us, self.step_floor_us)


class Loaded(NamedTuple):
    """The beginning of a prompt whose keys and values another engine computed, `cached_tokens` of it from its cache."""

    tokens: int
    cached_tokens: int


class Script(Protocol):
    """What a sequence will say."""

    def next_token(self) -> tuple[int, bool]:
        """The next token's id, and whether it is the last one. Not called again after the last."""


class Sequence:
    """One prompt and its answer. `max_tokens` 0 computes the prompt only (embeddings)."""

    __slots__ = (
        "arrived_at",
        "blocks",
        "cached_tokens",
        "computed",
        "created_cache_tokens",
        "finish_reason",
        "finished_at",
        "first_token_at",
        "gap_s",
        "hasher",
        "is_lent",
        "is_running",
        "last_token_at",
        "loaded",
        "loaded_tokens",
        "max_tokens",
        "number",
        "preemptions",
        "priority",
        "prompt_tokens",
        "published",
        "scheduled_at",
        "script",
        "tokens",
    )

    def __init__(
        self,
        prompt: list[int],
        script: Script,
        *,
        max_tokens: int,
        hasher: BlockHasher | None,
        priority: int = 0,
    ) -> None:
        """Without a `hasher` the sequence neither reads nor feeds the prefix cache."""
        self.tokens = list(prompt)
        self.prompt_tokens = len(prompt)
        self.script = script
        self.max_tokens = max_tokens
        self.hasher = hasher
        self.priority = priority  # lower runs earlier
        self.number = 0  # order of arrival
        self.blocks: list[Block] = []
        self.is_running = False
        self.is_lent = False  # its blocks stay held when it is finished, until `release`
        self.loaded: Loaded | None = None  # came from elsewhere, until it has to be computed again
        self.loaded_tokens = 0  # of the prompt, as counted
        self.computed = 0  # tokens whose keys and values are in blocks
        self.published = 0  # leading blocks that were offered to the cache, or came from it
        self.cached_tokens = 0
        self.created_cache_tokens = 0
        self.preemptions = 0
        self.finish_reason: FinishReason | None = None
        self.arrived_at = 0.0
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at = 0.0
        self.gap_s = 0.0  # between the last two tokens
        self.finished_at = 0.0

    @property
    def output_tokens(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def turn(self) -> tuple[int, int]:
        """The place in the queue; a pre-empted sequence keeps its own."""
        return (self.priority, self.number)


class Output(NamedTuple):
    """What one step brought a sequence: a token (None for a prompt only), and why it ended if it did."""

    sequence: Sequence
    token: int | None
    finish_reason: FinishReason | None


@dataclass(slots=True)
class Counters:
    """Totals since start. Those in tokens agree with the usage that callers were told."""

    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    hit_prompt_tokens: int = 0  # in this engine's own cache; the others were in that of one that prefilled
    generation_tokens: int = 0
    cache_query_tokens: int = 0
    cache_hit_tokens: int = 0
    loaded_tokens: int = 0  # of prompts, computed by other engines
    preemptions: int = 0
    admission_rejections: dict[QueueLimit, int] = field(
        default_factory=lambda: {"max_num_queued_reqs": 0, "max_num_queued_tokens": 0}
    )
    steps: int = 0
    finished: dict[FinishReason, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0})


class QueueFullError(Exception):
    """The waiting queue is at `max_num_queued_reqs`, or at `max_num_queued_tokens`."""

    def __init__(self, reason: QueueLimit) -> None:
        super().__init__(reason)
        self.reason = reason


class Engine:
    """One engine with its own cache."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.pool = BlockPool(settings.num_blocks)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.counters = Counters()
        self._arrivals = 0
        self._step: list[tuple[Sequence, int]] = []

    @property
    def cache_usage(self) -> float:
        """Share of blocks held by running sequences, 0 to 1."""
        return self.pool.used / self.pool.capacity

    def submit(self, sequences: list[Sequence], now: float) -> None:
        """Queue all of them, or none: QueueFullError."""
        limit = self._limit_reached(sequences)
        if limit is not None:
            self.counters.admission_rejections[limit] += 1
            raise QueueFullError(limit)
        for sequence in sequences:
            sequence.arrived_at = now
            sequence.number = self._arrivals
            self._arrivals += 1
            bisect.insort(self.waiting, sequence, key=_turn)

    def abort(self, sequence: Sequence, now: float) -> None:
        """Forget a sequence at once, in whatever state it is; its blocks are free when this returns."""
        if sequence.finish_reason is None:
            if not sequence.is_running:
                self.waiting.remove(sequence)
            self._finish(sequence, "abort", now)

    def release(self, sequence: Sequence) -> None:
        """A lent one's blocks are wanted no more."""
        self._give_back(sequence)

    def begin_step(self, now: float) -> float | None:
        """Choose the next step's work. Returns its duration in seconds, or None if there is nothing to do."""
        self._step = []
        budget = self.settings.max_num_batched_tokens
        budget, has_preempted = self._continue_running(budget)
        has_starts = not has_preempted and self._admit_waiting(budget, now)
        if not self._step:
            return None
        self.counters.steps += 1
        return self._duration_s(has_starts=has_starts)

    def end_step(self, now: float) -> list[Output]:
        """Settle the step begun last. Sequences aborted meanwhile are left out."""
        outputs = []
        for sequence, count in self._step:
            if sequence.finish_reason is not None:
                continue
            sequence.computed += count
            self._publish(sequence)
            if sequence.computed == len(sequence.tokens):
                outputs.append(self._sample(sequence, now))
        self._step = []
        return outputs

    def _limit_reached(self, sequences: list[Sequence]) -> QueueLimit | None:
        most = self.settings.max_num_queued_reqs
        if most is not None and len(self.waiting) + len(sequences) > most:
            return "max_num_queued_reqs"
        most = self.settings.max_num_queued_tokens
        if most is not None and sum(len(s.tokens) for s in (*self.waiting, *sequences)) > most:
            return "max_num_queued_tokens"
        return None

    def _continue_running(self, budget: int) -> tuple[int, bool]:
        """Give the batch its tokens: one for a decoding sequence, the rest of the prompt for a new one."""
        has_preempted = False
        for sequence in list(self.running):
            if not sequence.is_running:  # pre-empted by an earlier one in this loop
                continue
            count = min(len(sequence.tokens) - sequence.computed, budget)
            while count and not self._grow(sequence, count):
                has_preempted = True
                victim = max(self.running, key=_turn)
                self._preempt(victim)
                if victim is sequence:
                    count = 0
            if count:
                self._step.append((sequence, count))
                budget -= count
        if has_preempted:
            self._step = [(sequence, count) for sequence, count in self._step if sequence.is_running]
        return budget, has_preempted

    def _admit_waiting(self, budget: int, now: float) -> bool:
        """Start as many waiting sequences as fit. Returns whether any began for the first time."""
        has_starts = False
        while self.waiting and budget > 0 and len(self.running) < self.settings.max_num_seqs:
            sequence = self.waiting[0]
            hit = self._cached_run(sequence)
            computed = hit_tokens = len(hit) * self.settings.block_size
            if sequence.loaded is not None:
                computed = max(computed, sequence.loaded.tokens)
            count = min(len(sequence.tokens) - computed, budget)
            wanted = -(-(computed + count) // self.settings.block_size) - len(hit)
            # Asked before anything is claimed: a prompt that has to wait must not refresh its place in the cache.
            if not self.pool.has_room(hit, wanted):
                break
            self.pool.claim(hit)
            sequence.blocks = hit
            sequence.published = len(hit)
            sequence.computed = computed
            self._grow(sequence, count)
            del self.waiting[0]
            self.running.append(sequence)
            sequence.is_running = True
            self._step.append((sequence, count))
            budget -= count
            if sequence.scheduled_at is None:
                has_starts = True
                sequence.scheduled_at = now
                self._count_start(sequence, hit_tokens)
        return has_starts

    def _count_start(self, sequence: Sequence, hit_tokens: int) -> None:
        """What was there when it began. One whose prompt came from elsewhere tells what was cached there, as vLLM's does."""
        sequence.cached_tokens = hit_tokens
        if sequence.loaded is not None and sequence.loaded.tokens > hit_tokens:
            sequence.cached_tokens = max(hit_tokens, sequence.loaded.cached_tokens)
            sequence.loaded_tokens = sequence.prompt_tokens - hit_tokens
        if sequence.hasher is not None:
            self.counters.cache_query_tokens += sequence.prompt_tokens
            self.counters.cache_hit_tokens += hit_tokens

    def _cached_run(self, sequence: Sequence) -> list[Block]:
        """The cached head of a sequence. Its last token is always computed, or there would be nothing to sample."""
        if sequence.hasher is None:
            return []
        sequence.hasher.extend(sequence.tokens)
        return self.pool.match(
            sequence.hasher.digests[: (len(sequence.tokens) - 1) // self.settings.block_size]
        )

    def _duration_s(self, *, has_starts: bool) -> float:
        decoding = [s for s, count in self._step if count == 1 and s.output_tokens]
        us = self.settings.step_us(
            prefill_tokens=sum(count for _, count in self._step) - len(decoding),
            decodes=len(decoding),
            context_tokens=sum(sequence.computed for sequence in decoding),
            has_starts=has_starts,
        )
        return us / 1e6

    def _sample(self, sequence: Sequence, now: float) -> Output:
        if sequence.first_token_at is None:
            sequence.first_token_at = now
            self.counters.prompt_tokens += sequence.prompt_tokens
            self.counters.cached_prompt_tokens += sequence.cached_tokens
            self.counters.loaded_tokens += sequence.loaded_tokens
            if sequence.loaded_tokens:
                self.counters.hit_prompt_tokens += sequence.prompt_tokens - sequence.loaded_tokens
            else:
                self.counters.hit_prompt_tokens += sequence.cached_tokens
        else:
            sequence.gap_s = now - sequence.last_token_at
        sequence.last_token_at = now
        if sequence.max_tokens == 0:
            self._finish(sequence, "stop", now)
            return Output(sequence, None, "stop")
        token, is_last = sequence.script.next_token()
        sequence.tokens.append(token)
        self.counters.generation_tokens += 1
        reason: FinishReason | None = None
        if is_last:
            reason = "stop"
        elif (
            sequence.output_tokens >= sequence.max_tokens
            or len(sequence.tokens) >= self.settings.max_model_len
        ):
            reason = "length"
        if reason is not None:
            self._finish(sequence, reason, now)
        return Output(sequence, token, reason)

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Make room for `count` more computed tokens; False if the pool has too few free blocks."""
        wanted = -(-(sequence.computed + count) // self.settings.block_size) - len(sequence.blocks)
        if wanted <= 0:
            return True
        blocks = self.pool.allocate(wanted)
        if blocks is None:
            return False
        sequence.blocks += blocks
        return True

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks filled by this step findable."""
        if sequence.hasher is None:
            return
        sequence.hasher.extend(sequence.tokens)
        size = self.settings.block_size
        for index in range(sequence.published, sequence.computed // size):
            is_new = self.pool.publish(sequence.blocks[index], sequence.hasher.digests[index])
            # A prompt computed a second time, after pre-emption, is not created a second time.
            is_ours = sequence.loaded is None and sequence.preemptions == 0
            if is_new and (index + 1) * size <= sequence.prompt_tokens and is_ours:
                sequence.created_cache_tokens += size
            sequence.published += 1

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue, to be computed again: what the blocks held is gone unless the cache still has it."""
        self.running.remove(sequence)
        sequence.is_running = False
        sequence.loaded = None
        self._give_back(sequence)
        sequence.preemptions += 1
        self.counters.preemptions += 1
        bisect.insort(self.waiting, sequence, key=_turn)

    def _give_back(self, sequence: Sequence) -> None:
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = sequence.published = 0

    def _finish(self, sequence: Sequence, reason: FinishReason, now: float) -> None:
        if sequence.is_running:
            self.running.remove(sequence)
            sequence.is_running = False
        if reason == "abort" or not sequence.is_lent:
            self._give_back(sequence)
        sequence.finish_reason = reason
        sequence.finished_at = now
        self.counters.finished[reason] += 1


def _turn(sequence: Sequence) -> tuple[int, int]:
    return sequence.turn
