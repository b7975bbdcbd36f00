"""A publisher's messages: gaps, repetitions, restarts; against a publisher that is simulated with all its faults."""

import random

import msgspec
import pytest

from backends.kv_blocks import HeldBlocks
from backends.kv_events import read_batch
from backends.kv_stream import KvStream, Message


def message(number, *events, time=None):
    return Message(number, msgspec.msgpack.encode([float(number if time is None else time), list(events), 0]))


def stored(name, *, parent=None):
    return ["BlockStored", [name], parent, [name, name], 2, None]


def begun(*messages):
    stream = KvStream()
    stream.restart(list(messages))
    return stream


def test_messages_in_order_are_taken():
    stream = begun()
    assert stream.is_complete
    assert len(stream.take(message(0, stored(1))).added) == 1
    assert len(stream.take(message(1, stored(2, parent=1))).added) == 1
    assert len(stream.blocks) == 2


def test_a_gap_is_filled_by_what_follows_the_last_message():
    first, second, third = message(0, stored(1)), message(1, stored(2)), message(2, stored(3))
    stream = begun(first)
    assert stream.take(third) is None
    assert stream.repair_from == 0
    assert len(stream.resume([first, second, third]).added) == 2
    assert len(stream.take(message(3, stored(4))).added) == 1
    assert stream.is_complete


def test_what_was_repeated_and_comes_again_by_the_ordinary_way_is_taken_once():
    first, second = message(0, stored(1)), message(1, stored(1))
    stream = begun(first, second)
    assert stream.take(second) == ((), (), False)
    stream.take(message(2, ["BlockRemoved", [1]]))
    assert len(stream.blocks) == 1  # the second copy


@pytest.mark.parametrize(
    "repeated",
    [
        [],
        [message(1, stored(2))],
        [message(0, stored(9), time=50), message(1, stored(2))],
    ],
    ids=["nothing is repeated", "the last one is gone", "another publisher"],
)
def test_what_does_not_go_on_from_the_last_message_fills_no_gap(repeated):
    stream = begun(message(0, stored(1)))
    assert stream.take(message(2, stored(3))) is None
    assert stream.resume(repeated) is None


def test_a_hole_in_the_repetition_fills_no_gap():
    first = message(0, stored(1))
    stream = begun(first)
    assert stream.resume([first, message(2, stored(3))]) is None


def test_a_publisher_that_begins_again_is_noticed_though_its_numbers_fit():
    stream = begun(message(0, stored(1)), message(1, stored(2)))
    assert stream.take(message(0, stored(3), time=99)) is None
    assert stream.resume([message(1, stored(4), time=100)]) is None
    change = stream.restart([message(0, stored(3), time=99), message(1, stored(4), time=100)])
    assert change.is_cleared
    assert (len(change.added), len(stream.blocks), stream.is_complete) == (2, 2, True)


def test_what_a_publisher_no_longer_repeats_leaves_the_picture_partial():
    stream = KvStream()
    assert stream.restart([message(5, stored(6, parent=5)), message(6, stored(7))]).is_cleared
    assert (stream.is_complete, len(stream.blocks), stream.blocks.orphans) == (False, 1, 1)
    stream.restart(None)  # it cannot repeat at all
    assert len(stream.take(message(9, stored(1))).added) == 1
    assert not stream.is_complete


def test_an_unreadable_message_is_counted_and_passed_over():
    stream = begun()
    assert stream.take(Message(0, b"\xc1")) == ((), (), False)
    assert stream.unreadable == 1
    assert len(stream.take(message(1, stored(1))).added) == 1


@pytest.mark.parametrize("seed", range(20))
def test_whatever_is_lost_the_picture_is_the_publishers_own_or_says_that_it_is_not(seed):
    """Losses, restarts and a short memory, against the truth: the events of the publisher's present life, all of them."""
    rng = random.Random(seed)
    stream, log, kept, told = KvStream(), [], 8, set()
    clock, is_lost = 0, False

    def repeat(first):
        return [m for m in log[-kept:] if m.number >= first]

    stream.restart([])
    for _ in range(400):
        clock += 1
        if rng.random() < 0.02:
            log, is_lost = [], True  # it died, which its connection tells, and begins again
        names = rng.sample(range(30), 2)
        events = [stored(names[0]), ["BlockRemoved", [names[1]]]]
        log.append(message(len(log), *events, time=clock))
        if rng.random() < 0.15:
            continue  # lost
        change = None if is_lost else stream.take(log[-1])
        if change is None:
            is_lost = False
            change = stream.resume(repeat(stream.repair_from))
            if change is None:
                change = stream.restart(repeat(0))
        told = (set() if change.is_cleared else told) - set(change.removed) | set(change.added)
        truth = HeldBlocks()
        for past in log[0 if stream.is_complete else max(0, len(log) - kept) :]:
            truth.adopt(read_batch(past.payload).events)
        assert told == set(stream.blocks.names())
        if stream.is_complete:
            assert told == set(truth.names())
