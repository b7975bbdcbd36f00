"""Prompts in tokens, asked of an engine: what a turn costs, and when the answer is not to be had."""

import asyncio
import random

import msgspec
import pytest

from backends.adapter import Edits
from backends.dialect import COMPLETIONS, RESPONSES
from backends.kv_blocks import Chain
from backends.pool import Pool
from gateway.prompt_tokens import PromptTokens
from policies.placement.block_index import BlockIndex
from policies.prices import FREE
from policies.routing import Model, Target
from policies.session import cache_salt
from tests.support.builders import a_caller, a_document, a_provider, an_endpoint, an_exchange
from tests.support.telling_engine import TellingEngine

SIZE = 4
SECRET = b"secret"


class Setting:
    def __init__(self, engine, *, is_salted=False):
        self.engine = engine
        self.tokens = PromptTokens()
        self.endpoint = an_endpoint("pool/0", a_provider(base_url=engine.base_url))
        self.target = Target("pool", Pool("pool", (self.endpoint,), is_salted=is_salted), "demo", FREE)
        self.target.blocks = BlockIndex()
        self.target.blocks.follow(b"pool/0", SIZE, is_partial=False)
        self.target.patience_s = 30.0
        self.model = Model("demo", (self.target,))

    async def read(self, dialect=None, *, caller=None, edits=None, **body):
        exchange = an_exchange(model=self.model, document=a_document(**body), edits=edits)
        exchange.dialect = dialect or exchange.dialect
        exchange.caller = caller or a_caller()
        await self.tokens.read(exchange, SECRET)
        return exchange.known and exchange.known.chain

    def whole(self, salt=None, **body):
        return Chain(SIZE, first=salt).extended(self.engine.tokens(body))

    @property
    def outcomes(self):
        return self.tokens.counts


@pytest.fixture
async def engine():
    async with TellingEngine() as running:
        yield running


@pytest.fixture
async def setting(engine):
    made = Setting(engine)
    yield made
    await made.endpoint.connections.close()


def same(one, two):
    return (one.names, one.tail) == (two.names, two.tail)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def words(rng, count):
    return " ".join(f"w{rng.randrange(500)}" for _ in range(count))


@pytest.mark.parametrize("forgetful", [False, True], ids=["a plain template", "one that leaves things out"])
async def test_a_conversation_in_turns_has_the_tokens_of_the_whole(setting, engine, forgetful):
    rng = random.Random(1)
    engine.forgetful = forgetful
    conversations = [[user(words(rng, 30))] for _ in range(5)]
    for _ in range(60):
        messages = rng.choice(conversations)
        assert same(await setting.read(messages=messages), setting.whole(messages=messages))
        messages += [assistant(words(rng, 9)), user(words(rng, 20))]
    assert setting.outcomes == {"told": 60}


async def test_a_further_turn_asks_only_for_what_is_new(setting, engine):
    rng = random.Random(2)
    messages = [{"role": "system", "content": words(rng, 900)}, user("first")]
    for _ in range(6):
        await setting.read(messages=messages)
        messages = [*messages, assistant(words(rng, 9)), user("next")]
    engine.asked.clear()
    chain = await setting.read(messages=messages)
    assert same(chain, setting.whole(messages=messages))
    (asked,) = engine.asked
    assert asked["messages"][1:] == messages[-2:]
    engine.asked.clear()
    assert same(await setting.read(messages=messages), chain)
    assert engine.asked == []
    other = [messages[0], user("somebody else's first")]
    assert same(await setting.read(messages=other), setting.whole(messages=other))
    assert all(len(str(body)) < 1000 for body in engine.asked)


async def test_an_edited_past_is_another_conversation(setting):
    messages = [user("a b c d e"), assistant("f g"), user("h i j k l m n o")]
    await setting.read(messages=messages)
    messages[1] = assistant("something else")
    assert same(await setting.read(messages=messages), setting.whole(messages=messages))


async def test_tools_and_options_are_part_of_the_prompt(setting, engine):
    tools = [{"type": "function", "function": {"name": "f"}}]
    messages = [user("a b c d e f g h")]
    plain = await setting.read(messages=messages)
    chain = await setting.read(messages=messages, tools=tools)
    assert same(chain, setting.whole(messages=messages, tools=tools))
    assert not same(chain, plain)
    await setting.read(messages=messages, reasoning_effort="high", chat_template_kwargs={"a": 1})
    wanted = {"a": 1, "reasoning_effort": "high", "enable_thinking": True}
    assert wanted in [body.get("chat_template_kwargs") for body in engine.asked]
    engine.asked.clear()
    await setting.read(messages=messages, tools=tools, tool_choice="none")
    assert not any("tools" in body for body in engine.asked)


async def test_a_template_that_minds_who_speaks_after_whom_is_asked_whole(setting, engine):
    engine.minds_beginnings = True
    messages = [user("a b c d")]
    await setting.read(messages=messages)
    messages = [*messages, user("e f g h i")]  # the answer never came
    engine.asked.clear()
    engine.minds_beginnings = True
    assert await setting.read(messages=messages) is None  # the engine minds this one, too
    engine.minds_beginnings = False
    assert same(await setting.read(messages=messages), setting.whole(messages=messages))
    assert setting.outcomes == {"told": 2, "failed": 1}


async def test_tenants_have_other_names_for_the_same_blocks_where_caches_are_salted(engine):
    setting = Setting(engine, is_salted=True)
    messages = [user("a b c d e f g h")]
    one, two = a_caller("k1", "team one"), a_caller("k2", "team two")
    chains = [await setting.read(messages=messages, caller=caller) for caller in (one, two)]
    for caller, chain in zip((one, two), chains, strict=True):
        assert same(chain, setting.whole(salt=cache_salt(SECRET, caller, b""), messages=messages))
    asked = await setting.read(messages=messages, caller=one, cache_salt="mine")
    assert same(asked, setting.whole(salt=cache_salt(SECRET, one, b'"mine"'), messages=messages))
    await setting.endpoint.connections.close()


async def test_a_clients_salt_counts_where_the_pool_sets_none(setting):
    messages = [user("a b c d e f g h")]
    assert same(
        await setting.read(messages=messages, cache_salt="x"), setting.whole(salt="x", messages=messages)
    )
    assert same(await setting.read(messages=messages, cache_salt=None), setting.whole(messages=messages))


async def test_an_adapter_is_part_of_every_blocks_name(setting):
    messages = [user("a b c d e f g h")]
    plain = await setting.read(messages=messages)
    setting.target.blocks.adapters.add("demo")
    adapted = await setting.read(messages=messages)
    expected = Chain(SIZE, every="demo").extended(setting.engine.tokens({"messages": messages}))
    assert same(adapted, expected)
    assert not same(adapted, plain)


async def test_a_completion_is_told_from_its_text_or_is_its_own_tokens(setting, engine):
    text = "a b c d e f g h i"
    for _ in range(2):
        assert same(await setting.read(COMPLETIONS, prompt=text), setting.whole(prompt=text))
    assert len(engine.asked) == 1
    chain = await setting.read(COMPLETIONS, prompt=[1, 2, 3, 4, 5])
    assert same(chain, Chain(SIZE).extended([1, 2, 3, 4, 5]))
    assert len(engine.asked) == 1


@pytest.mark.parametrize(
    ("dialect", "body", "outcome"),
    [
        (RESPONSES, {"input": "a"}, "untellable"),
        (None, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "untellable"),
        (None, {"messages": [user("a")], "continue_final_message": True}, "untellable"),
        (None, {"messages": "no list"}, "untellable"),
        (None, {"messages": []}, "untellable"),
        (None, {"messages": [user("a " * 200_000)]}, "too_long"),
        (None, {"messages": [user("a " * 600_000)]}, "too_long"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "untellable"),
        (COMPLETIONS, {"prompt": "a " * 200_000}, "too_long"),
    ],
)
async def test_what_cannot_be_told_is_not_asked_about(setting, engine, dialect, body, outcome):
    assert await setting.read(dialect, **body) is None
    assert setting.outcomes == {outcome: 1}
    assert engine.asked == []


async def test_a_rules_change_of_the_prompt_is_not_guessed_at(setting):
    messages = [user("a b c d")]
    changed = Edits(frozenset(), {"messages": b'"messages":[]'})
    assert await setting.read(messages=messages, edits=changed) is None
    harmless = Edits(frozenset({"top_p"}), {"temperature": b'"temperature":0'})
    assert await setting.read(messages=messages, edits=harmless) is not None


async def test_an_engine_that_fails_or_takes_too_long_leaves_it_to_the_guess(setting, engine):
    engine.status = 500
    assert await setting.read(messages=[user("a")]) is None
    setting.target.patience_s = 1e-4
    assert await setting.read(messages=[user("b")]) is None
    assert setting.outcomes == {"failed": 1, "late": 1}
    setting.target.blocks.block_size = 0
    assert await setting.read(messages=[user("c")]) is None
    assert setting.outcomes["unindexed"] == 1


async def test_a_model_that_counts_otherwise_is_not_asked_for_ever(setting, engine):
    for n in range(3):
        exchange = an_exchange(model=setting.model, document=a_document(messages=[user(f"a{n} b c")]))
        await setting.tokens.read(exchange, SECRET)
        exchange.known.template.counted(is_same=False)
    engine.asked.clear()
    assert await setting.read(messages=[user("d")]) is None
    assert setting.outcomes["refuted"] == 1
    assert engine.asked == []


async def test_many_at_once_are_all_told(setting):
    rng = random.Random(3)
    many = [[user(words(rng, 20)), assistant("x"), user(words(rng, 5))] for _ in range(40)]
    chains = await asyncio.gather(*(setting.read(messages=messages) for messages in many))
    for chain, messages in zip(chains, many, strict=True):
        assert same(chain, setting.whole(messages=messages))
    assert msgspec.json.encode(setting.outcomes) == b'{"told":40}'
