"""A publisher's messages: gaps, repetitions, restarts; against a publisher that is simulated with all its faults."""

import pytest

from backends.kv_stream import KvStream, Message
from tests.mutants.kv_events import MUTANTS
from tests.support.kv_publisher_life import live, message, stored


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
def test_whatever_is_lost_what_is_believed_is_what_the_publisher_holds(seed):
    live(seed)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_build_that_believes_wrongly_is_caught(monkeypatch, mutant):
    owner, name, instead = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, instead)
    with pytest.raises(AssertionError, match="seed"):
        for seed in range(20):
            live(seed)
