"""The simulation's engine against the step-wise one: the same schedule, to the step."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.routing.replica import Job, Replica
from local_engine.prefix_cache import BlockHasher
from local_engine.simulator.engine import Engine, EngineSettings, Sequence

CONVERSATIONS = 4


class Silent:
    """Says for ever what no prompt has in it."""

    def next_token(self):
        return 999_999, False


def work(seed, count, gap_s, longest):
    """Prompts that continue a few conversations: (at, conversation, prompt tokens, answer tokens)."""
    rng = random.Random(seed)
    at, asked = 0.0, []
    for _ in range(count):
        at += rng.expovariate(1 / gap_s)
        asked.append((at, rng.randrange(CONVERSATIONS), rng.randint(1, longest), rng.randint(1, 60)))
    return asked


def step_by_step(engine_settings, asked):
    engine, sequences, now = Engine(engine_settings), [], 0.0
    todo = list(asked)
    while todo or engine.running or engine.waiting:
        while todo and todo[0][0] <= now:
            at, conversation, prompt, answer = todo.pop(0)
            # The answer's tokens are its own: prompts share only what they have in common.
            tokens = [conversation * 10_000 + n for n in range(prompt)]
            script = Silent()
            hasher = BlockHasher(engine_settings.block_size)
            sequence = Sequence(tokens, script, max_tokens=answer, hasher=hasher)
            engine.submit([sequence], at)
            sequences.append(sequence)
        duration = engine.begin_step(now)
        if duration is None:
            now = todo[0][0]
            continue
        now += duration
        engine.end_step(now)
    return engine, sequences


def by_events(engine_settings, asked):
    replica, jobs = Replica(engine_settings), []
    size = engine_settings.block_size
    for at, conversation, prompt, answer in asked:
        while replica.next_at is not None and replica.next_at < at:
            replica.advance(replica.next_at)
        whole = prompt // size
        # Blocks with any of the answer in them: after this prompt there is only the answer.
        own = [(conversation, prompt, index) for index in range(whole, (prompt + answer) // size)]
        jobs.append(Job(prompt, answer, [(conversation, index) for index in range(whole)] + own))
        assert replica.submit(jobs[-1], at)
    while replica.next_at is not None:
        replica.advance(replica.next_at)
    return replica, jobs


@pytest.mark.parametrize("gap_s", [0.02, 0.3])
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    blocks=st.integers(30, 120),
    seats=st.integers(1, 12),
    read_us=st.sampled_from([0.0, 3.0]),
    floor_us=st.sampled_from([0.0, 8000.0]),
)
def test_the_replica_by_events_does_what_the_engine_does_step_by_step(
    gap_s, seed, blocks, seats, read_us, floor_us
):
    engine_settings = EngineSettings(
        num_blocks=blocks,
        max_model_len=blocks * 16,
        max_num_seqs=seats,
        max_num_batched_tokens=96,
        prefill_overhead_us=3000.0,
        prefill_us_per_token=100.0,
        decode_us_per_token=5000.0,
        kv_read_us_per_token=read_us,
        step_floor_us=floor_us,
    )
    asked = work(seed, 40, gap_s, 16 * (blocks - 5))
    engine, sequences = step_by_step(engine_settings, asked)
    replica, jobs = by_events(engine_settings, asked)
    assert [job.cached_tokens for job in jobs] == [sequence.cached_tokens for sequence in sequences]
    assert [job.preemptions for job in jobs] == [sequence.preemptions for sequence in sequences]
    assert [job.first_token_at for job in jobs] == pytest.approx([s.first_token_at for s in sequences])
    assert [job.finished_at for job in jobs] == pytest.approx([s.finished_at for s in sequences])
    assert replica.pool.used == engine.pool.used == 0
    assert replica.preemptions == engine.counters.preemptions


def test_a_replica_that_dies_forgets_everything_and_serves_again():
    engine_settings = EngineSettings(num_blocks=100, max_model_len=1600)
    replica = Replica(engine_settings)
    first, second = (Job(320, 50, [("x", n) for n in range(23)]) for _ in range(2))
    replica.submit(first, 0.0)
    replica.advance(0.0)
    assert replica.next_at is not None
    replica.advance(replica.next_at)
    assert first.first_token_at is not None
    assert replica.fail(first.first_token_at + 0.003) == [first]
    assert (replica.next_at, replica.pool.used, replica.pool.cached) == (None, 0, 0)
    replica.submit(second, 9.0)
    while replica.next_at is not None:
        replica.advance(replica.next_at)
    assert (second.cached_tokens, second.is_finished) == (0, True)


def test_a_full_queue_refuses():
    replica = Replica(EngineSettings(max_num_queued_reqs=1))
    assert replica.submit(Job(10, 1, []), 0.0)
    assert not replica.submit(Job(10, 1, []), 0.0)
    by_tokens = Replica(EngineSettings(max_num_queued_tokens=100))
    assert by_tokens.submit(Job(60, 1, []), 0.0)
    assert not by_tokens.submit(Job(60, 1, []), 0.0)
