"""The engine core on an injected clock: scheduling, timing, caching, admission, pre-emption."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from local_engine.prefix_cache import BlockHasher
from local_engine.simulator.engine import Engine, EngineSettings, QueueFullError, Sequence


class Counting:
    """Says 1000, 1001, ... and ends by itself after `length` tokens."""

    def __init__(self, length=None):
        self.said = 0
        self.length = length

    def next_token(self):
        self.said += 1
        return 999 + self.said, self.said == self.length


def a_sequence(prompt, *, max_tokens=4, length=None, salt=None, priority=0):
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    hasher = BlockHasher(16, salt=salt)
    return Sequence(tokens, Counting(length), max_tokens=max_tokens, hasher=hasher, priority=priority)


def an_engine(**changes):
    chosen = {"prefill_overhead_us": 1000.0, "prefill_us_per_token": 10.0, "decode_us_per_token": 500.0}
    return Engine(EngineSettings(**(chosen | changes)))


class Clock:
    """Runs an engine step by step and keeps the time."""

    def __init__(self, engine):
        self.engine = engine
        self.now = 0.0

    def step(self):
        duration = self.engine.begin_step(self.now)
        if duration is None:
            return None
        self.now += duration
        return self.engine.end_step(self.now)

    def run(self, *sequences):
        if sequences:
            self.engine.submit(list(sequences), self.now)
        while self.step() is not None:
            pass

    def ttft_s(self, sequence):
        start = self.now
        self.run(sequence)
        return sequence.first_token_at - start


def test_a_lone_prompt_takes_overhead_plus_its_uncached_tokens():
    clock = Clock(an_engine())
    assert clock.ttft_s(a_sequence(100)) == pytest.approx(0.001 + 100 * 10e-6)


def test_prompts_that_start_together_share_the_overhead_and_add_their_tokens():
    clock = Clock(an_engine())
    first, second = a_sequence([1] * 100), a_sequence([2] * 60)
    clock.run(first, second)
    assert first.first_token_at == second.first_token_at == pytest.approx(0.001 + 160 * 10e-6)


def test_a_prompt_longer_than_one_step_takes_no_longer_for_being_cut():
    clock = Clock(an_engine(max_num_batched_tokens=64))
    assert clock.ttft_s(a_sequence(1000)) == pytest.approx(0.001 + 1000 * 10e-6)


def test_the_same_long_prompt_again_is_cached_and_faster():
    clock = Clock(an_engine())
    first, second = a_sequence(531), a_sequence(531)
    slow, fast = clock.ttft_s(first), clock.ttft_s(second)
    assert (first.cached_tokens, first.created_cache_tokens) == (0, 528)
    assert (second.cached_tokens, second.created_cache_tokens) == (528, 0)
    assert fast == pytest.approx(0.001 + 3 * 10e-6)
    assert slow == pytest.approx(0.001 + 531 * 10e-6)


def test_a_hit_never_covers_the_whole_prompt():
    clock = Clock(an_engine())
    clock.run(a_sequence(64))
    again = a_sequence(64)
    clock.run(again)
    assert again.cached_tokens == 48


def test_another_salt_shares_nothing():
    clock = Clock(an_engine())
    clock.run(a_sequence(320, salt="a"))
    other, same = a_sequence(320, salt="b"), a_sequence(320, salt="a")
    clock.run(other)
    clock.run(same)
    assert other.cached_tokens == 0
    assert same.cached_tokens == 304


def test_an_answer_is_cached_for_the_turn_that_follows_it():
    clock = Clock(an_engine())
    first = a_sequence(100, max_tokens=60)
    clock.run(first)
    second = a_sequence([*first.tokens, 7, 8, 9])
    clock.run(second)
    # 160 tokens in all; the keys of the very last one were never computed.
    assert second.cached_tokens == 144


def test_a_prompt_only_sequence_ends_without_a_token():
    engine = an_engine()
    sequence = Sequence([1, 2, 3], Counting(), max_tokens=0, hasher=None)
    engine.submit([sequence], 0.0)
    engine.begin_step(0.0)
    (output,) = engine.end_step(1.0)
    assert (output.token, output.finish_reason) == (None, "stop")
    assert engine.pool.used == 0


def test_answers_end_where_the_script_or_the_limit_says():
    clock = Clock(an_engine(max_model_len=32))
    stopped, cut, full = a_sequence(8, length=3), a_sequence(8, max_tokens=2), a_sequence(30, max_tokens=50)
    clock.run(stopped, cut, full)
    assert [s.finish_reason for s in (stopped, cut, full)] == ["stop", "length", "length"]
    assert [s.output_tokens for s in (stopped, cut, full)] == [3, 2, 2]


def test_decoding_slows_down_as_the_batch_fills():
    engine = an_engine(max_num_seqs=11, load_factor=3.0)
    clock = Clock(engine)
    engine.submit([a_sequence([n] * 4, max_tokens=3) for n in range(11)], 0.0)
    clock.step()
    assert engine.begin_step(clock.now) == pytest.approx(3 * 500e-6)


def test_no_more_run_than_fit_and_the_rest_wait_in_order():
    engine = an_engine(max_num_seqs=2)
    clock = Clock(engine)
    sequences = [a_sequence([n] * 4, max_tokens=2) for n in range(5)]
    engine.submit(sequences, 0.0)
    clock.step()
    assert engine.running == sequences[:2]
    assert engine.waiting == sequences[2:]
    clock.run()
    assert sequences[4].scheduled_at > sequences[2].scheduled_at > 0.0


def test_lower_priority_numbers_run_first_and_equals_in_order_of_arrival():
    engine = an_engine(max_num_seqs=1)
    late = [a_sequence([n] * 4, max_tokens=1, priority=p) for n, p in enumerate((0, 5, -1, 0, -1))]
    engine.submit(late, 0.0)
    Clock(engine).run()
    order = sorted(late, key=lambda s: s.finished_at)
    assert order == [late[2], late[4], late[0], late[3], late[1]]


def test_a_full_queue_refuses_all_of_a_submission_or_none():
    engine = an_engine(max_num_queued_reqs=2)
    engine.submit([a_sequence(4)], 0.0)
    with pytest.raises(QueueFullError):
        engine.submit([a_sequence(4), a_sequence(4)], 0.0)
    assert len(engine.waiting) == 1
    assert engine.counters.admission_rejections["max_num_queued_reqs"] == 1
    engine.submit([a_sequence(4)], 0.0)


@pytest.mark.parametrize("stage", ["waiting", "prefill", "decode"])
def test_aborting_frees_everything_at_once_in_any_stage(stage):
    engine = an_engine(max_num_seqs=1, max_num_batched_tokens=8)
    clock = Clock(engine)
    sequence, other = a_sequence(24, max_tokens=9), a_sequence([5] * 24, max_tokens=9)
    engine.submit([other, sequence] if stage == "waiting" else [sequence, other], 0.0)
    for _ in range({"waiting": 1, "prefill": 1, "decode": 5}[stage]):
        clock.step()
    engine.begin_step(clock.now)
    engine.abort(sequence, clock.now)
    assert sequence.finish_reason == "abort"
    assert sequence not in engine.running
    assert sequence not in engine.waiting
    assert not sequence.blocks
    assert all(output.sequence is not sequence for output in engine.end_step(clock.now))
    clock.run()
    assert other.finish_reason == "length"
    assert engine.pool.used == 0


def test_the_last_to_come_is_preempted_when_blocks_run_out_and_still_finishes():
    engine = an_engine(num_blocks=8, max_model_len=128)
    clock = Clock(engine)
    first, last = a_sequence([1] * 60, max_tokens=40), a_sequence([2] * 60, max_tokens=40)
    clock.run(first, last)
    assert first.preemptions == 0
    assert last.preemptions > 0
    assert engine.counters.preemptions == last.preemptions
    assert (first.output_tokens, last.output_tokens) == (40, 40)
    assert last.tokens[60:] == list(range(1000, 1040)), "recomputing repeats nothing"
    assert last.created_cache_tokens + last.cached_tokens <= 60
    assert engine.pool.used == 0


def test_settings_that_could_never_hold_one_sequence_are_refused():
    with pytest.raises(ValueError, match="raise num_blocks or lower max_model_len"):
        EngineSettings(num_blocks=10, max_model_len=161)


@settings(max_examples=60, deadline=None)
@given(
    work=st.lists(
        st.tuples(
            st.integers(1, 60),
            st.integers(1, 30),
            st.integers(0, 2),
            st.sampled_from([None, "s"]),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=12,
    ),
    blocks=st.integers(6, 20),
    budget=st.integers(1, 40),
)
def test_whatever_comes_every_sequence_ends_and_every_count_agrees(work, blocks, budget):
    engine = an_engine(num_blocks=blocks, max_model_len=96, max_num_seqs=3, max_num_batched_tokens=budget)
    clock = Clock(engine)
    sequences, doomed = [], []
    for length, max_tokens, first_token, salt, patience in work:
        sequence = a_sequence([first_token] * length, max_tokens=max_tokens, salt=salt)
        engine.submit([sequence], clock.now)
        sequences.append(sequence)
        if patience:
            clock.step()
        if patience == 1:
            engine.abort(sequence, clock.now)
            doomed.append(sequence)
        held = set(itertools.chain.from_iterable(s.blocks for s in sequences))
        assert engine.pool.used == len(held) <= blocks
        assert all(block.holders > 0 for block in held)
    clock.run()
    assert engine.pool.used == 0
    assert not engine.running
    assert not engine.waiting
    counters = engine.counters
    assert counters.generation_tokens == sum(s.output_tokens for s in sequences)
    told = [s for s in sequences if s.first_token_at is not None]
    assert counters.prompt_tokens == sum(s.prompt_tokens for s in told)
    assert counters.cached_prompt_tokens == sum(s.cached_tokens for s in told)
    assert counters.cache_hit_tokens == sum(s.cached_tokens for s in sequences)
    for sequence in sequences:
        assert sequence.cached_tokens % 16 == 0
        assert sequence.cached_tokens < sequence.prompt_tokens
        assert sequence.cached_tokens + sequence.created_cache_tokens <= sequence.prompt_tokens
        assert sequence.finish_reason in ("stop", "length") or sequence in doomed


def test_a_decode_step_is_longer_for_the_context_it_reads_and_no_step_is_below_the_floor():
    clock = Clock(an_engine(kv_read_us_per_token=2.0))
    sequence = a_sequence(1000)
    clock.run(sequence)
    assert sequence.finished_at - sequence.first_token_at == pytest.approx(
        3 * 500e-6 + (1000 + 1001 + 1002) * 2e-6
    )
    floored = Clock(an_engine(step_floor_us=5000.0))
    sequence = a_sequence(100)
    assert floored.ttft_s(sequence) == pytest.approx(0.005)


def test_too_many_waiting_tokens_are_refused():
    engine = an_engine(max_num_queued_tokens=150)
    engine.submit([a_sequence(100)], 0.0)
    with pytest.raises(QueueFullError) as full:
        engine.submit([a_sequence(51)], 0.0)
    assert full.value.reason == "max_num_queued_tokens"
    assert engine.counters.admission_rejections == {"max_num_queued_reqs": 0, "max_num_queued_tokens": 1}


def test_a_prompt_that_waits_for_memory_does_not_refresh_its_place_in_the_cache():
    engine = an_engine(num_blocks=20, max_model_len=320)
    clock = Clock(engine)
    older, newer = a_sequence([1] * 64), a_sequence([2] * 64)
    clock.run(older)
    clock.run(newer)
    engine.submit([a_sequence([3] * 200, max_tokens=8)], clock.now)  # takes the last block of the older one
    clock.step()
    waiting = a_sequence([1] * 64 + [4] * 200)
    engine.submit([waiting], clock.now)
    clock.step()
    assert not waiting.is_running
    assert len(engine.pool.match(older.hasher.digests[:4])) == 3
    engine.pool.allocate(3)
    assert engine.pool.match(older.hasher.digests) == []
    assert len(engine.pool.match(newer.hasher.digests[:4])) == 4
