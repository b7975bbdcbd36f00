"""Chains of blocks, and an engine's cache told by events under the engine's own names."""

import random

from backends.kv_blocks import Chain, HeldBlocks
from backends.kv_events import Cleared, Removed, Stored


def stored(names, tokens, parent=None, size=2, extras=(), adapter=None):
    return Stored(names, parent, tokens, size, extras, adapter)


def test_a_prompt_and_a_cache_of_the_same_tokens_have_the_same_names():
    held = HeldBlocks()
    change = held.adopt([stored([901, 902], [1, 2, 3, 4]), stored([903], [5, 6], parent=902)])
    chain = Chain(2).extended([1, 2, 3, 4, 5, 6, 7])
    assert list(chain.names) == list(change.added) == list(held.names())
    assert (chain.tokens, list(chain.tail)) == (7, [7])


def test_a_chain_made_in_pieces_is_that_of_the_whole():
    rng = random.Random(1)
    tokens = [rng.randrange(200_000) for _ in range(1000)]
    whole = Chain(16, first="salt").extended(tokens)
    pieces = Chain(16, first="salt")
    while tokens:
        count = rng.randint(1, 60)
        pieces, tokens = pieces.extended(tokens[:count]), tokens[count:]
    assert (pieces.names, pieces.tail) == (whole.names, whole.tail)


def test_salts_and_adapters_give_other_names_and_the_engines_say_them_per_block():
    tokens = [1, 2, 3, 4]
    plain = Chain(2).extended(tokens)
    salted = Chain(2, first="x").extended(tokens)
    adapted = Chain(2, every="a").extended(tokens)
    both = Chain(2, every="a", first="x").extended(tokens)
    assert len({chain.names[1] for chain in (plain, salted, adapted, both)}) == 4
    for chain, extras in (
        (salted, [["x"], None]),
        (adapted, [["a"], ["a"]]),
        (both, [["a", "x"], ["a"]]),
    ):
        assert list(HeldBlocks().adopt([stored([1, 2], tokens, extras=extras)]).added) == list(chain.names)


def test_a_block_is_gone_when_its_last_copy_is():
    held = HeldBlocks()
    (name,) = held.adopt([stored([7], [1, 2])]).added
    assert not held.adopt([stored([7], [1, 2]), stored([7], [1, 2])]).added
    for _ in range(2):
        assert not held.adopt([Removed([7])]).removed
    assert list(held.adopt([Removed([7])]).removed) == [name]
    assert not held.adopt([Removed([7])]).removed
    assert len(held) == 0


def test_what_follows_an_untold_block_cannot_be_named():
    held = HeldBlocks()
    assert not held.adopt([stored([8, 9], [1, 2, 3, 4], parent=7)]).added
    assert held.orphans == 2


def test_one_change_says_what_is_different_in_the_end():
    held = HeldBlocks()
    (old,) = held.adopt([stored([1], [1, 2])]).added
    change = held.adopt([Removed([1]), stored([1], [1, 2]), stored([2], [3, 4]), Removed([2])])
    assert list(change.added) == [old]
    assert old not in change.removed
    cleared = held.adopt([stored([3], [5, 6]), Cleared(), stored([4], [7, 8])])
    assert cleared.is_cleared
    assert len(cleared.added) == len(held) == 1


def test_an_engine_never_reports_a_whole_prompt_as_cached():
    chain = Chain(4).extended(range(8))
    assert [chain.cacheable_tokens(blocks) for blocks in (0, 1, 2)] == [0, 4, 4]
    assert Chain(4).extended(range(9)).cacheable_tokens(2) == 8
    assert Chain(4).cacheable_tokens(0) == 0
