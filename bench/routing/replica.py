"""One engine of the discrete-event simulation: the step-wise engine of `local_engine.simulator`, run by events.

It schedules exactly as that one does (a test holds them side by side), but while a batch only decodes, and nothing can
join it, the next event is the end of its shortest answer: all steps up to there are one. Prompts are lists of block
digests, so nothing here costs by the token. Knows no clock, no requests' origin and no policy.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from itertools import islice

from local_engine.prefix_cache import Block, BlockPool
from local_engine.simulator.engine import EngineSettings


class Job:
    """A prompt and how long its answer will be. `digests` names the full blocks of prompt and answer, as far as known.

    The list may be shared and grow at its end; what is there stays.
    """

    __slots__ = (
        "arrived_at",
        "blocks",
        "cached_tokens",
        "computed",
        "digests",
        "finished_at",
        "first_token_at",
        "is_prefilling",
        "is_running",
        "length",
        "number",
        "origin",
        "output_tokens",
        "preemptions",
        "produced",
        "prompt_tokens",
        "published",
        "scheduled_at",
    )

    def __init__(
        self, prompt_tokens: int, output_tokens: int, digests: Sequence[object], origin: object = None
    ) -> None:
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.digests = digests
        self.origin = origin
        self.length = prompt_tokens
        self.produced = 0
        self.computed = 0
        self.published = 0
        self.blocks: list[Block] = []
        self.number = 0
        self.is_running = False
        self.is_prefilling = False
        self.cached_tokens = 0
        self.preemptions = 0
        self.arrived_at = 0.0
        self.scheduled_at: float | None = None
        self.first_token_at: float | None = None
        self.finished_at = 0.0

    @property
    def is_finished(self) -> bool:
        return self.produced >= self.output_tokens


class Replica:
    """One engine. `submit`, then `advance` at every `next_at`; `next_at` is None while there is nothing to do."""

    __slots__ = (
        "_arrivals",
        "_base_us",
        "_context_tokens",
        "_is_blocked",
        "_prefilling",
        "_run_began_at",
        "_run_steps",
        "_step",
        "busy_s",
        "computed_tokens",
        "next_at",
        "number",
        "pool",
        "preemptions",
        "running",
        "settings",
        "slowness",
        "waiting",
    )

    def __init__(self, settings: EngineSettings, number: int = 0) -> None:
        self.settings = settings
        self.number = number
        self.pool = BlockPool(settings.num_blocks)
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.next_at: float | None = None
        self.slowness = 1.0
        self.preemptions = 0
        self.computed_tokens = 0  # prompt tokens that had to be computed
        self.busy_s = 0.0
        self._arrivals = 0
        self._prefilling = 0  # running jobs whose prompt is not computed yet
        self._is_blocked = False  # the first that waits lacks memory, and only an end can change that
        self._step: list[tuple[Job, int]] = []
        self._run_steps = 0  # 0: the step under way is in `_step`
        self._run_began_at = 0.0
        self._base_us = 0.0
        self._context_tokens = 0

    @property
    def kv_usage(self) -> float:
        return self.pool.used / self.pool.capacity

    def submit(self, job: Job, now: float) -> bool:
        """False: the waiting queue is at its limit."""
        limit = self.settings.max_num_queued_reqs
        if limit is not None and len(self.waiting) >= limit:
            return False
        most = self.settings.max_num_queued_tokens
        if most is not None and sum(waiting.length for waiting in self.waiting) + job.length > most:
            return False
        job.arrived_at = now
        job.number = self._arrivals
        self._arrivals += 1
        self.waiting.append(job)  # the last to come; those pre-empted are in order before it
        if self.next_at is None:
            self.next_at = now
        elif self._run_steps > 1 and not self._is_blocked and len(self.running) < self.settings.max_num_seqs:
            self._cut_run(now)
        return True

    def fail(self, now: float) -> list[Job]:
        """The process dies: everything is dropped, the cache is cold. Returns what was lost."""
        if self._run_steps > 1:
            self._cut_run(now)
        lost = [*self.running, *self.waiting]
        for job in self.running:
            self._give_back(job)
        self.pool.clear()
        self.running, self.waiting, self._step = [], [], []
        self.next_at, self._run_steps, self._prefilling, self._is_blocked = None, 0, 0, False
        return lost

    def advance(self, now: float) -> list[Job]:
        """Ends the step or run that is due at `now` and begins the next. Returns jobs with a first token or at their end."""
        told = self._end(now)
        self._begin(now)
        return told

    def _begin(self, now: float) -> None:
        steps = self._steps_in_a_row()
        if steps:
            self._run_steps, self._run_began_at = steps, now
            batch = len(self.running)
            settings = self.settings
            load = (batch - 1) / max(1, settings.max_num_seqs - 1)
            self._base_us = settings.decode_us_per_token * (1 + (settings.load_factor - 1) * load)
            self._context_tokens = sum(job.computed for job in self.running)
            self.next_at = now + self._run_s(steps)
        else:
            self._run_steps = 0
            duration_s = self._begin_step(now)
            self.next_at = None if duration_s is None else now + duration_s
        if self.next_at is not None:
            self.busy_s += self.next_at - now

    def _run_s(self, steps: int) -> float:
        """How long the first `steps` decode steps of the run take."""
        batch = len(self.running)
        read = steps * self._context_tokens + batch * (steps * (steps - 1) // 2)
        us = steps * self._base_us + read * self.settings.kv_read_us_per_token
        return max(us, steps * self.settings.step_floor_us) / 1e6 * self.slowness

    def _cut_run(self, now: float) -> None:
        """Something came: the run ends with the step that is under way."""
        began_at, low, high = self._run_began_at, 1, self._run_steps
        while low < high:
            middle = (low + high) // 2
            if began_at + self._run_s(middle) > now:
                high = middle
            else:
                low = middle + 1
        if self.next_at is not None:
            ends_at = began_at + self._run_s(low)
            self.busy_s -= self.next_at - ends_at
            self.next_at = ends_at
        self._run_steps = low

    def _steps_in_a_row(self) -> int:
        """How many steps can be taken as one: nothing but decodes, nobody joins, nobody ends before the last, blocks suffice."""
        running = self.running
        if not running or self._prefilling or len(running) > self.settings.max_num_batched_tokens:
            return 0
        if self.waiting and not self._is_blocked and len(running) < self.settings.max_num_seqs:
            return 0
        steps = min(job.output_tokens - job.produced for job in running)
        free = self.pool.capacity - self.pool.used
        while steps and self._wanted(steps) > free:
            steps //= 2
        if self.settings.step_floor_us and steps > 1:
            steps = self._steps_on_one_side_of_the_floor(steps)
        return steps

    def _steps_on_one_side_of_the_floor(self, steps: int) -> int:
        """A run's length is a closed form only where all of its steps are floored, or none is."""
        settings = self.settings
        batch = len(self.running)
        load = (batch - 1) / max(1, settings.max_num_seqs - 1)
        us = settings.decode_us_per_token * (1 + (settings.load_factor - 1) * load)
        us += sum(job.computed for job in self.running) * settings.kv_read_us_per_token
        growth = batch * settings.kv_read_us_per_token
        if us >= settings.step_floor_us or growth == 0:
            return steps
        return max(1, min(steps, int((settings.step_floor_us - us) / growth)))

    def _wanted(self, steps: int) -> int:
        """New blocks that the batch takes in so many steps."""
        size = self.settings.block_size
        return sum(-(-(job.computed + steps) // size) - len(job.blocks) for job in self.running)

    def _end(self, now: float) -> list[Job]:
        if self._run_steps:
            return self._end_run(now)
        told = []
        if self._prefilling:
            self._is_blocked = False  # what was computed may be what the first that waits begins with
        for job, count in self._step:
            job.computed += count
            self._publish(job)
            if job.computed == job.length and self._sample(job, now):
                told.append(job)
        self._step = []
        return told

    def _end_run(self, now: float) -> list[Job]:
        steps, size = self._run_steps, self.settings.block_size
        self._run_steps = 0
        told = []
        for job in self.running:
            job.computed += steps
            wanted = -(-job.computed // size) - len(job.blocks)
            if wanted > 0:
                blocks = self.pool.allocate(wanted)
                assert blocks is not None  # `_steps_in_a_row` counted them
                job.blocks += blocks
        for job in tuple(self.running):
            self._publish(job)
            job.length += steps
            job.produced += steps
            if job.produced >= job.output_tokens:
                self._finish(job, now)
                told.append(job)
        return told

    def _begin_step(self, now: float) -> float | None:
        self._step = []
        budget = self.settings.max_num_batched_tokens
        budget, has_preempted = self._continue_running(budget)
        has_starts = not has_preempted and self._admit_waiting(budget, now)
        if not self._step:
            return None
        prefill_tokens = decodes = context_tokens = 0
        for job, count in self._step:
            if count == 1 and job.produced:
                decodes += 1
                context_tokens += job.computed
            else:
                prefill_tokens += count
        us = self.settings.step_us(
            prefill_tokens=prefill_tokens,
            decodes=decodes,
            context_tokens=context_tokens,
            has_starts=has_starts,
        )
        self.computed_tokens += prefill_tokens
        return us / 1e6 * self.slowness

    def _continue_running(self, budget: int) -> tuple[int, bool]:
        has_preempted = False
        step = self._step
        for job in tuple(self.running):
            if not job.is_running:  # pre-empted by an earlier one in this loop
                continue
            count = min(job.length - job.computed, budget)
            while count and not self._grow(job, count):
                has_preempted = True
                victim = max(self.running, key=_number)
                self._preempt(victim)
                if victim is job:
                    count = 0
            if count:
                step.append((job, count))
                budget -= count
        if has_preempted:
            self._step = [(job, count) for job, count in step if job.is_running]
        return budget, has_preempted

    def _admit_waiting(self, budget: int, now: float) -> bool:
        has_starts = False
        size = self.settings.block_size
        while self.waiting and budget > 0 and len(self.running) < self.settings.max_num_seqs:
            job = self.waiting[0]
            hit = self.pool.match(islice(job.digests, (job.length - 1) // size))
            computed = len(hit) * size
            count = min(job.length - computed, budget)
            wanted = -(-(computed + count) // size) - len(hit)
            if not self.pool.has_room(hit, wanted):
                self._is_blocked = True
                break
            self.pool.claim(hit)
            job.blocks = hit
            job.published = len(hit)
            job.computed = computed
            self._grow(job, count)
            del self.waiting[0]
            self.running.append(job)
            job.is_running = True
            job.is_prefilling = True
            self._prefilling += 1
            self._step.append((job, count))
            budget -= count
            if job.scheduled_at is None:
                has_starts = True
                job.scheduled_at = now
                job.cached_tokens = computed
        return has_starts

    def _grow(self, job: Job, count: int) -> bool:
        wanted = -(-(job.computed + count) // self.settings.block_size) - len(job.blocks)
        if wanted <= 0:
            return True
        blocks = self.pool.allocate(wanted)
        if blocks is None:
            return False
        job.blocks += blocks
        return True

    def _publish(self, job: Job) -> None:
        full = min(job.computed // self.settings.block_size, len(job.digests))
        publish, blocks, digests = self.pool.publish, job.blocks, job.digests
        for index in range(job.published, full):
            publish(blocks[index], digests[index])
        job.published = max(job.published, full)

    def _sample(self, job: Job, now: float) -> bool:
        """One token more. Whether that is news: the first, or the last."""
        if job.is_prefilling:
            job.is_prefilling = False
            self._prefilling -= 1
        is_first = job.first_token_at is None
        if is_first:
            job.first_token_at = now
        job.length += 1
        job.produced += 1
        if job.produced >= job.output_tokens:
            self._finish(job, now)
            return True
        return is_first

    def _preempt(self, job: Job) -> None:
        self.running.remove(job)
        self._give_back(job)
        job.preemptions += 1
        self.preemptions += 1
        bisect.insort(self.waiting, job, key=_number)

    def _give_back(self, job: Job) -> None:
        self.pool.release(job.blocks)
        job.blocks = []
        job.computed = job.published = 0
        job.is_running = False
        if job.is_prefilling:
            job.is_prefilling = False
            self._prefilling -= 1
        self._is_blocked = False

    def _finish(self, job: Job, now: float) -> None:
        self.running.remove(job)
        self._give_back(job)
        job.finished_at = now


def _number(job: Job) -> int:
    return job.number
