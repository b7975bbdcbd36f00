"""Traffic made from a seed, and Mooncake's format."""

import json
from itertools import islice

import pytest

from bench.routing.traces import MOONCAKE_BLOCK_TOKENS, AgentTraffic, read_mooncake


def test_the_same_seed_makes_the_same_conversations_in_whatever_order():
    forwards = [AgentTraffic(seed=5).conversation(n).turns for n in range(20)]
    backwards = [AgentTraffic(seed=5).conversation(n).turns for n in reversed(range(20))]
    assert forwards == backwards[::-1]
    assert forwards != [AgentTraffic(seed=6).conversation(n).turns for n in range(20)]


def test_tenants_are_skewed_and_share_their_system_prompts_only_with_themselves():
    made = [AgentTraffic(seed=1).conversation(n) for n in range(400)]
    by_tenant = {}
    for conversation in made:
        by_tenant.setdefault(conversation.tenant, []).append(conversation)
    assert len(by_tenant[0]) > 3 * len(by_tenant[20])
    one, two = by_tenant[0][:2]
    stranger = by_tenant[1][0]
    blocks = [c.blocks(c.turns[0].added_tokens, 16) for c in (one, two, stranger)]
    shared = one.shared_tokens // 16
    assert one.shared_tokens == two.shared_tokens
    assert blocks[0][:shared] == blocks[1][:shared]
    assert blocks[0][shared] != blocks[1][shared]
    assert not set(blocks[0]) & set(blocks[2])


def test_beginnings_are_equal_exactly_as_far_as_the_shared_prompt_goes():
    made = (AgentTraffic(seed=1).conversation(n) for n in range(400))
    one, two = islice((c for c in made if c.tenant == 0), 2)
    edge = one.shared_tokens * 4
    assert one.beginning(edge) == two.beginning(edge)
    assert one.beginning(edge + 1) != two.beginning(edge + 1)
    assert one.beginning(edge - 1) != one.beginning(edge)


def test_a_prompt_continues_the_one_before_it():
    conversation = AgentTraffic(seed=3).conversation(7)
    first = list(conversation.blocks(2000, 64))
    assert conversation.blocks(9000, 64)[: len(first)] == first


def written(path, *requests):
    path.write_text("".join(json.dumps(request) + "\n" for request in requests))
    return path


def request(at_ms, tokens, hash_ids, output=5):
    return {"timestamp": at_ms, "input_length": tokens, "output_length": output, "hash_ids": hash_ids}


def test_a_file_in_mooncakes_format_is_read_block_by_block(tmp_path):
    path = written(tmp_path / "t.jsonl", request(0, 1100, [7, 8, 9]), request(4000, 1500, [7, 8, 10]))
    one, two = read_mooncake(path, speed=2.0)
    assert (one.at_s, two.at_s) == (0.0, 2.0)
    assert (one.turns[0].added_tokens, one.turns[0].output_tokens) == (1100, 5)
    fine, coarse = two.blocks(1505, 64), one.blocks(1105, MOONCAKE_BLOCK_TOKENS)
    assert len(fine) == 1500 // 64
    assert len(coarse) == 2
    # 1100 tokens are 17 blocks of 64; 1024 of those tokens are the same in both.
    same = [a == b for a, b in zip(read_mooncake(path)[0].blocks(1105, 64), fine, strict=False)]
    assert same == [True] * 16 + [False]
    assert one.beginning(4 * 1024) == two.beginning(4 * 1024)
    assert one.beginning(4 * 1100) != two.beginning(4 * 1100)


@pytest.mark.parametrize(
    "line",
    ['{"timestamp": 0}', "[]", "nonsense", json.dumps(request(0, 5000, [1])), json.dumps(request(0, 5, []))],
)
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(request(0, 10, [1])) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:2"):
        read_mooncake(path)
