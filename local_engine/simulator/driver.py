"""Runs the engine in real time on an asyncio loop.

Owns the one timer that ends a step, and the calls that wait for tokens. Model time is stretched by `time_scale`; at
0 every step is instant, and the loop gets its turn between bursts of steps. Closing a call aborts what it has not
finished, at once. Knows no HTTP.
"""

import asyncio
from dataclasses import dataclass
from typing import Final, NamedTuple

from local_engine.prefix_cache import BlockHasher
from local_engine.simulator.engine import Engine, FinishReason, Loaded, Output, Sequence
from local_engine.simulator.generation import Generation, Served
from local_engine.simulator.metrics import Metrics
from local_engine.simulator.speech import Piece, Speech, Text, sampling_seed

_STEPS_PER_TURN: Final = 16
# A loop that is this late starts its next step from now instead of catching up.
_LATEST_S: Final = 0.05


class EngineStoppedError(Exception):
    """The engine went away under a call."""


class Event(NamedTuple):
    """One token of one choice; the last carries why it ended."""

    choice: int
    piece: Piece
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Tally:
    """Tokens of one call, as its usage tells them. Each prompt counts once, however many samples it has."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    created_cache_tokens: int


class Call:
    """One API call's sequences, choice by choice, and what they said since it was last asked."""

    def __init__(
        self, driver: "Driver", sequences: list[Sequence], speeches: list[Speech], samples: int
    ) -> None:
        self.sequences = sequences
        self.speeches = speeches
        self._driver = driver
        self._samples = samples
        self._events: list[Event] = []
        self._open = len(sequences)
        self._failure: str | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def events(self) -> list[Event]:
        """What happened since the last call, waiting for something to happen; empty once all is said."""
        while self._open and not self._events and self._failure is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if self._failure is not None:
            raise EngineStoppedError(self._failure)
        events, self._events = self._events, []
        return events

    def tally(self) -> Tally:
        first_samples = self.sequences[:: self._samples]
        return Tally(
            sum(sequence.prompt_tokens for sequence in first_samples),
            sum(sequence.output_tokens for sequence in self.sequences),
            sum(sequence.cached_tokens for sequence in first_samples),
            sum(sequence.created_cache_tokens for sequence in first_samples),
        )

    def close(self) -> None:
        """Abort whatever is unfinished. Idempotent."""
        self._driver.forget(self)

    def deliver(self, choice: int, output: Output) -> None:
        """For the driver: one step's outcome for one choice."""
        if output.finish_reason is not None:
            self._open -= 1
        if output.token is not None:
            self._events.append(Event(choice, self.speeches[choice].latest, output.finish_reason))
        self._wake()

    def fail(self, message: str) -> None:
        """For the driver: nothing more will come."""
        self._failure = message
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Driver:
    """The engine's clock."""

    def __init__(self, engine: Engine, metrics: Metrics, served: Served, time_scale: float) -> None:
        self.engine = engine
        self._metrics = metrics
        self._served = served
        self._time_scale = time_scale
        self.slowness = 1.0  # a fault: every step takes this many times as long
        self._loop = asyncio.get_running_loop()
        self._calls: dict[Sequence, tuple[Call, int]] = {}
        self._is_stepping = False
        self._step_ends_at = 0.0
        self._idle: asyncio.Future[None] | None = None

    @property
    def open_sequences(self) -> int:
        return len(self._calls)

    def generate(
        self, generation: Generation, *, is_lent: bool = False, loaded: Loaded | None = None
    ) -> Call:
        """Queue one sequence per choice. QueueFullError if the engine will not take them.

        `is_lent`: the blocks of what finishes are another engine's to collect. `loaded` came from another.
        """
        sampling = generation.sampling
        sequences, speeches = [], []
        for number, prompt in enumerate(generation.prompts):
            for sample in range(sampling.n):
                choice = number * sampling.n + sample
                seed = sampling_seed(self._served.seed, self._served.model, prompt, sampling.seed, choice)
                speech = Speech(generation.saying, seed, sampling.stops)
                hasher = BlockHasher(self.engine.settings.block_size, salt=sampling.cache_salt)
                sequence = Sequence(
                    prompt,
                    speech,
                    max_tokens=sampling.max_tokens or self._served.max_model_len,
                    hasher=hasher,
                    priority=sampling.priority,
                )
                sequence.is_lent, sequence.loaded = is_lent, loaded
                sequences.append(sequence)
                speeches.append(speech)
        return self._submit(Call(self, sequences, speeches, sampling.n))

    def embed(self, prompts: list[list[int]]) -> Call:
        """Queue prompts that are computed and say nothing. They neither use nor feed the prefix cache."""
        mute = Speech(Text(""), 0)
        sequences = [Sequence(prompt, mute, max_tokens=0, hasher=None) for prompt in prompts]
        return self._submit(Call(self, sequences, [mute] * len(prompts), 1))

    def forget(self, call: Call) -> None:
        """Abort a call's unfinished sequences."""
        now = self._loop.time()
        for sequence in call.sequences:
            if self._calls.pop(sequence, None) is not None:
                self.engine.abort(sequence, now)
        self._note_idle()

    def fail_all(self, message: str) -> None:
        """Abort everything and tell every call so."""
        for call in {id(call): call for call, _ in self._calls.values()}.values():
            self.forget(call)
            call.fail(message)

    async def idle(self) -> None:
        """Returns when no call is open. One waiter at a time."""
        if self._calls:
            self._idle = self._loop.create_future()
            await self._idle

    def _note_idle(self) -> None:
        if self._idle is not None and not self._calls and not self._idle.done():
            self._idle.set_result(None)

    def _submit(self, call: Call) -> Call:
        self.engine.submit(call.sequences, self._loop.time())
        for choice, sequence in enumerate(call.sequences):
            self._calls[sequence] = (call, choice)
        if not self._is_stepping:
            # On the loop's next turn, so that what arrives together starts together.
            self._is_stepping = True
            self._loop.call_soon(self._start)
        return call

    def _start(self) -> None:
        if self._begin(self._loop.time()):
            self._end()

    def _begin(self, start: float) -> bool:
        """Begin a step at `start`. True if its end is due already, else there is a timer for it or nothing to do."""
        now = self._loop.time()
        if self._time_scale == 0 or now - start > _LATEST_S:
            start = now
        duration_s = self.engine.begin_step(start)
        if duration_s is None:
            self._is_stepping = False
            return False
        self._step_ends_at = start + duration_s * self._time_scale * self.slowness
        if self._step_ends_at <= now:
            return True
        self._loop.call_at(self._step_ends_at, self._end)
        return False

    def _end(self) -> None:
        """End the step, and as many more as are due, within reason."""
        for _ in range(_STEPS_PER_TURN):
            for output in self.engine.end_step(self._step_ends_at):
                self._tell(output)
            if not self._begin(self._step_ends_at):
                return
        self._loop.call_soon(self._end)

    def _tell(self, output: Output) -> None:
        self._metrics.observe(output)
        call, choice = self._calls[output.sequence]
        if output.finish_reason is not None:
            del self._calls[output.sequence]
            self._note_idle()
        call.deliver(choice, output)
