"""The prefix cache: vLLM's own hashes, and a pool whose books always balance."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from local_engine.prefix_cache import ROOT_DIGEST, Block, BlockHasher, BlockPool


def digests(tokens, *, size=16, salt=None, lora=None):
    hasher = BlockHasher(size, salt=salt, lora=lora)
    hasher.extend(tokens)
    return hasher.digests


def test_digests_are_those_vllm_computes_with_sha256_cbor():
    assert ROOT_DIGEST.hex() == "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"
    assert [d.hex() for d in digests(range(32))] == [
        "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749",
        "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c",
    ]


def test_a_salt_enters_the_first_digest_as_vllm_puts_it_there():
    salted = digests(range(16), salt="tenant-a")
    assert salted[0].hex() == "4e31e1ced73eb044a95997f0109d0ddab3d9145878214f1a0ee37c048b397859"


@pytest.mark.parametrize("token", [23, 24, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**53 - 1])
def test_every_width_of_token_id_has_a_digest_of_its_own(token):
    assert digests([token] * 16) != digests([token - 1] * 16)


def test_salt_and_lora_change_every_digest_that_follows():
    plain = digests(range(64))
    for other in (digests(range(64), salt="a"), digests(range(64), lora=("style", "/lora"))):
        assert len(other) == 4
        assert not set(plain) & set(other)


def test_a_block_that_is_not_full_has_no_digest():
    assert digests(range(15)) == []
    assert len(digests(range(31))) == 1


@given(st.lists(st.integers(0, 2**53 - 1), max_size=60), st.integers(1, 60))
def test_hashing_in_pieces_gives_the_same_chain_as_hashing_at_once(tokens, cut):
    hasher = BlockHasher(4)
    hasher.extend(tokens[:cut])
    hasher.extend(tokens)
    assert hasher.digests == digests(tokens, size=4)


def test_the_least_recently_released_prefix_is_forgotten_first():
    pool = BlockPool(2)
    first, second = pool.allocate(1), pool.allocate(1)
    pool.publish(first[0], b"first")
    pool.publish(second[0], b"second")
    pool.release(second)
    pool.release(first)
    pool.release(pool.allocate(1))
    assert pool.match([b"first"])
    assert not pool.match([b"second"])


def test_the_tail_of_a_prefix_is_forgotten_before_its_head():
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, digest in zip(blocks, (b"1", b"2", b"3"), strict=True):
        pool.publish(block, digest)
    pool.release(blocks)
    pool.allocate(1)
    assert pool.match([b"1", b"2", b"3"]) == blocks[:2]


def test_a_block_nobody_can_find_again_is_taken_before_a_cached_one():
    pool = BlockPool(2)
    cached, nameless = pool.allocate(1), pool.allocate(1)
    pool.publish(cached[0], b"cached")
    pool.release(cached)
    pool.release(nameless)
    assert pool.allocate(1) == nameless
    assert pool.match([b"cached"]) == cached


def test_a_claimed_prefix_cannot_be_taken_from_its_holder():
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], b"kept")
    pool.release(blocks)
    pool.claim(pool.match([b"kept"]))
    assert pool.allocate(2) is None
    assert pool.allocate(1) == [blocks[1]]
    assert pool.match([b"kept"]) == [blocks[0]]


def test_clearing_forgets_prefixes_but_leaves_blocks_with_their_holders():
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], b"gone")
    pool.clear()
    assert not pool.match([b"gone"])
    assert pool.used == 1


class PoolUse(RuleBasedStateMachine):
    """Sequences over a tiny alphabet come, share prefixes and go, in any order."""

    capacity, size = 12, 2

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(self.capacity)
        self.held: list[list[Block]] = []
        self.content: dict[Block, tuple[int, ...]] = {}  # what a cached block stands for: the whole prefix

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14))
    def start_a_sequence(self, tokens):
        chain = digests(tokens, size=self.size)
        hit = self.pool.match(chain)
        for index, block in enumerate(hit):
            assert self.content[block] == tuple(tokens[: (index + 1) * self.size]), "a hit is a true prefix"
        self.pool.claim(hit)
        blocks = self.pool.allocate(-(-len(tokens) // self.size) - len(hit))
        if blocks is None:
            self.pool.release(hit)
            return
        mine = hit + blocks
        for index in range(len(hit), len(chain)):
            if self.pool.publish(mine[index], chain[index]):
                self.content[mine[index]] = tuple(tokens[: (index + 1) * self.size])
        self.held.append(mine)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def end_a_sequence(self, data):
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def holders_are_counted_exactly(self):
        for block in {block for blocks in self.held for block in blocks}:
            assert block.holders == sum(blocks.count(block) for blocks in self.held)

    @invariant()
    def capacity_is_never_exceeded(self):
        held = {block for blocks in self.held for block in blocks}
        assert self.pool.used == len(held) <= self.capacity
        assert self.pool.cached <= self.capacity


TestPoolUse = PoolUse.TestCase
TestPoolUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
