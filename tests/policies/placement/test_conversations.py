"""What is remembered of conversations, and when parts may stand for the whole."""

from backends.kv_blocks import Chain
from policies.placement.conversations import Conversations, Template, message_keys


def chain(count, size=4):
    return Chain(size).extended(range(count))


def test_the_longest_known_beginning_is_found():
    known = Conversations(1 << 20)
    keys = message_keys(1, [b"system", b"question", b"answer", b"again"])
    known.remember(keys[0], chain(10))
    known.remember(keys[2], chain(30))
    count, found = known.longest(keys, 4)
    assert (count, found.tokens) == (3, 30)
    other = message_keys(1, [b"system", b"another question"])
    assert known.longest(other, 4)[0] == 1
    assert known.longest(message_keys(2, [b"system", b"question"]), 4) == (0, None)
    assert known.longest(keys, 8) == (0, None)


def test_memory_is_bounded_and_the_oldest_is_forgotten_first():
    known = Conversations(100_000)
    for key in range(1000):
        known.remember(key, chain(4000))
        assert known.size_bytes <= 100_000
    assert 0 < len(known) < 20
    assert known.longest([999], 4)[1] is not None
    assert known.longest([0], 4)[1] is None
    for key in range(1000):
        known.forget(key)
    assert known.size_bytes == 0


def test_templates_are_bounded_too():
    known = Conversations(1 << 20)
    first = known.template(0)
    for seed in range(1000):
        known.template(seed)
    assert known.template(0) is not first


def test_parts_are_trusted_after_they_have_equalled_the_whole_and_are_checked_now_and_then():
    template = Template()
    template.learn([1, 2], [1, 2, 3])
    proofs = 0
    while template.wants_proof():
        template.compared(is_same=True)
        proofs += 1
    assert proofs == 2
    assert sum(template.wants_proof() for _ in range(640)) == 10
    template.compared(is_same=False)
    assert not template.is_joined
    assert template.without_opening([7, 3]) is None


def test_a_prompt_without_the_opening_is_its_messages():
    template = Template()
    assert template.without_opening([7, 8]) is None
    template.learn([1, 2], [1, 2, 3, 4])
    assert list(template.without_opening([7, 8, 3, 4])) == [7, 8]
    assert template.without_opening([7, 8, 3]) is None
    assert template.without_opening([]) is None


def test_a_template_whose_opening_is_not_at_the_end_is_asked_whole():
    template = Template()
    template.learn([1, 2], [9, 1, 2])
    assert not template.is_joined


def test_a_model_that_counts_otherwise_is_left_alone_and_tried_again():
    template = Template()
    for _ in range(2):
        template.counted(is_same=False)
    assert template.is_useful()
    template.counted(is_same=False)
    assert [template.is_useful() for _ in range(2048)].count(True) == 2
    template.counted(is_same=True)
    assert template.is_useful()
