"""The exact index against a naive one, and the prefix policy that asks it."""

import random

import pytest

from backends.kv_blocks import Chain
from backends.load import EndpointLoad
from backends.placement_config import PlacementConfig
from policies.placement.ask import Ask
from policies.placement.block_index import BlockIndex
from policies.placement.conversations import Known, Template
from policies.placement.registry import placer

SIZE = 4


def chain(*tokens):
    return Chain(SIZE).extended(tokens)


def an_index(*keys):
    index = BlockIndex()
    for key in keys:
        index.follow(key, SIZE, is_partial=False)
    return index


def test_each_endpoint_is_matched_as_far_as_it_holds_the_prompt():
    index, prompt = an_index(b"a", b"b", b"c"), chain(*range(17))
    index.change(b"a", prompt.names, ())
    index.change(b"b", prompt.names[:2], ())
    assert index.match(prompt) == {b"a": 16, b"b": 8, b"c": 0}
    index.change(b"a", (), prompt.names[1:])
    assert index.match(prompt) == {b"a": 4, b"b": 8, b"c": 0}


def test_a_prompt_that_is_held_whole_is_not_reported_whole():
    index, prompt = an_index(b"a"), chain(*range(16))
    index.change(b"a", prompt.names, ())
    assert index.match(prompt) == {b"a": 12}


def test_what_is_cleared_or_forgotten_is_of_that_endpoint_only():
    index, prompt = an_index(b"a", b"b"), chain(*range(9))
    for key in (b"a", b"b"):
        index.change(key, prompt.names, ())
    index.clear(b"a")
    assert index.match(prompt) == {b"a": 0, b"b": 8}
    index.forget(b"b")
    assert index.match(prompt) == {b"a": 0}
    assert len(index) == 0
    index.change(b"b", prompt.names, ())  # late: it is not followed any more
    assert len(index) == 0


def test_blocks_of_another_size_match_nothing():
    index = an_index(b"a")
    prompt = Chain(8).extended(range(20))
    index.change(b"a", prompt.names, ())
    assert index.match(prompt) == {b"a": 0}


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_what_a_naive_search_finds(seed):
    """Engines free the end of a prompt before its beginning."""
    rng = random.Random(seed)
    keys = [bytes([65 + n]) for n in range(12)]
    index, held = an_index(*keys), {key: set() for key in keys}
    prompts = [chain(*rng.choices(range(3), k=rng.randint(0, 90))) for _ in range(40)]
    for _ in range(600):
        key, prompt = rng.choice(keys), rng.choice(prompts)
        names = list(prompt.names)
        if rng.random() < 0.6:
            added = names[: rng.randint(0, len(names))]
            held[key] |= set(added)
            index.change(key, added, ())
        else:
            kept = set(names[: rng.randint(0, len(names))])
            # Whatever goes on from what is dropped is dropped before.
            gone = [n for p in prompts for n in follows(list(p.names), set(names) - kept) if n in held[key]]
            held[key] -= set(gone)
            index.change(key, (), gone)
        asked = rng.choice(prompts)
        found = index.match(asked)
        for key in keys:
            run = 0
            while run < len(asked.names) and asked.names[run] in held[key]:
                run += 1
            assert found[key] == asked.cacheable_tokens(run)
        assert sum(index.held(key) for key in keys) == sum(map(len, held.values()))


def test_what_was_answered_is_believed_before_the_events_say_it():
    index, prompt = an_index(b"a", b"b"), chain(*range(17))
    index.assume(b"a", prompt)
    longer = prompt.extended(range(100, 120))
    assert index.match(longer) == {b"a": 16, b"b": 0}
    assert index.match(chain(*range(8), 77, 78, 79, 80, 81)) == {b"a": 8, b"b": 0}
    index.change(b"a", prompt.names, ())  # now they say it
    index.change(b"a", (), ())
    index.change(b"a", (), prompt.names[1:])
    assert index.match(longer) == {b"a": 4, b"b": 0}


def test_what_was_answered_and_is_never_told_of_is_soon_not_believed():
    index, prompt = an_index(b"a"), chain(*range(17))
    index.assume(b"a", prompt)
    for n in range(16):
        assert index.match(prompt) == {b"a": 16}
        index.change(b"a", [n], ())
    index.change(b"a", [99], ())
    assert index.match(prompt) == {b"a": 0}
    for n in range(100):
        index.assume(b"a", chain(n, *range(16)))
    assert index.match(chain(0, *range(16))) == {b"a": 0}
    assert index.match(chain(99, *range(16))) == {b"a": 16}


def test_what_was_answered_and_then_dropped_is_not_believed():
    index, prompt = an_index(b"a"), chain(*range(17))
    index.assume(b"a", prompt)
    index.change(b"a", (), prompt.names[3:])
    assert index.match(prompt) == {b"a": 0}
    index.assume(b"a", prompt)
    index.clear(b"a")
    assert index.match(prompt) == {b"a": 0}
    index.assume(b"nobody", prompt)
    assert index.match(prompt) == {b"a": 0}


def follows(names, dropped):
    first = next((place for place, name in enumerate(names) if name in dropped), len(names))
    return names[first:]


def endpoints(count):
    return [EndpointLoad(f"gpu/{n}", bytes([97 + n])) for n in range(count)]


def an_ask(prompt, template=None, **fields):
    known = Known("gpu", prompt, template or Template())
    return Ask(known=known, prompt_tokens=prompt.tokens, prompt_bytes=4 * prompt.tokens, **fields)


def test_the_policy_goes_where_the_engine_says_it_is_cached_and_predicts_just_that():
    index, pool = an_index(b"a", b"b", b"c"), endpoints(3)
    policy = placer(PlacementConfig(policy="prefix"), index)
    prompt = chain(*range(100))
    index.change(b"c", prompt.names, ())
    ask = an_ask(prompt)
    ranking = policy.rank(pool, pool, ask, 0.0)
    assert (ranking.endpoints[0].name, ranking.reason) == ("gpu/2", "warm")
    assert [policy.cached_tokens(endpoint, ask) for endpoint in pool] == [0, 0, 96]
    assert ask.is_exact


def test_a_session_whose_blocks_are_gone_is_not_believed_to_be_cached():
    index, pool = an_index(b"a", b"b"), endpoints(2)
    policy = placer(PlacementConfig(policy="prefix"), index)
    prompt = chain(*range(100))
    policy.dispatched(pool[0], an_ask(prompt, session=7), 0.0)
    policy.finished(pool[0], an_ask(prompt, session=7), 100, 20)
    index.change(b"a", prompt.names, ())
    index.change(b"a", (), prompt.names)
    again = an_ask(prompt, session=7)
    policy.rank(pool, pool, again, 1.0)
    assert policy.cached_tokens(pool[0], again) == 0


def test_what_was_sent_stands_in_for_events_that_are_still_to_come():
    """A burst of the same beginning goes together, though no engine has told of it yet."""
    index, pool = an_index(b"a", b"b"), endpoints(2)
    policy = placer(PlacementConfig(policy="prefix"), index)
    prompt = chain(*range(1000))
    beginnings = {"prefixes": (5, 6), "prefix_bytes": (2048, 4000)}
    first = an_ask(prompt, **beginnings)
    chosen = policy.rank(pool, pool, first, 0.0).endpoints[0]
    policy.dispatched(chosen, first, 0.0)
    for _ in range(3):
        ask = an_ask(prompt, **beginnings)
        ranking = policy.rank(pool, pool, ask, 0.0)
        assert (ranking.endpoints[0], ranking.reason) == (chosen, "warm")
        assert policy.cached_tokens(chosen, ask) == 0


def test_endpoints_that_do_not_tell_are_guessed_at():
    index, pool = an_index(b"a"), endpoints(2)
    policy = placer(PlacementConfig(policy="prefix"), index)
    prompt = chain(*range(1000))
    beginnings = {"prefixes": (5, 6), "prefix_bytes": (2048, 4000)}
    policy.dispatched(pool[1], an_ask(prompt, **beginnings), 0.0)
    ask = an_ask(prompt, **beginnings)
    assert policy.rank(pool, pool, ask, 0.0).endpoints[0] is pool[1]
    assert policy.cached_tokens(pool[1], ask) > 900
    assert not ask.is_exact
    assert policy.cached_tokens(pool[0], ask) == 0
    assert ask.is_exact


def test_of_one_that_told_only_a_part_a_miss_is_guessed_at_and_a_hit_is_believed():
    index, pool = BlockIndex(), endpoints(2)
    index.follow(b"a", SIZE, is_partial=True)
    index.follow(b"b", SIZE, is_partial=False)
    policy = placer(PlacementConfig(policy="prefix"), index)
    prompt = chain(*range(1000))
    beginnings = {"prefixes": (5, 6), "prefix_bytes": (2048, 4000)}
    policy.dispatched(pool[0], an_ask(prompt, **beginnings), 0.0)
    ask = an_ask(prompt, **beginnings)
    assert policy.cached_tokens(pool[0], ask) > 900
    index.change(b"a", prompt.names[:10], ())
    ask = an_ask(prompt, **beginnings)
    assert policy.cached_tokens(pool[0], ask) == 40


def test_the_template_hears_what_the_engine_counted():
    index, pool = an_index(b"a", b"b"), endpoints(2)
    policy = placer(PlacementConfig(policy="prefix"), index)
    template = Template()
    for _ in range(3):
        policy.finished(pool[0], an_ask(chain(*range(50)), template), 51, 5)
    assert not template.is_useful()
    policy.finished(pool[0], an_ask(chain(*range(50)), template), 50, 5)
    assert template.is_useful()
