"""Sessions recognised by their first turns, and prompts by their beginnings."""

import itertools
import json

import pytest

from backends.json_object import read_object
from policies.placement.prompt import FirstTurns, prefixes, prompt_of

WRITERS = {
    "compact": lambda body: json.dumps(body, separators=(",", ":")),
    "spaced": json.dumps,
    "indented": lambda body: json.dumps(body, indent=2),
}
ROLES_FIRST = {True: lambda role, content: {"role": role, "content": content},
               False: lambda role, content: {"content": content, "role": role}}  # fmt: skip
TEXTS = ["plain", 'quotes " and \\ and "user"', "braces } ] { [ ,", "ü 漢 🙂", ""]


def session(body, write=json.dumps, scope=1, turns=None):
    document = read_object(write(body).encode())
    return (turns or FirstTurns()).session(prompt_of(document.values), scope)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("is_role_first", [True, False], ids=["role first", "content first"])
def test_a_conversation_is_one_session_however_long_it_gets(write, is_role_first):
    message = ROLES_FIRST[is_role_first]
    for system, user in itertools.product(TEXTS, TEXTS):
        messages = [message("system", system), message("user", user)]
        first = session({"messages": messages}, write)
        longer = [*messages, message("assistant", "an } answer"), message("user", "more")]
        assert session({"messages": longer}, write) == first
        other = [message("system", system), message("user", user + "!")]
        assert session({"messages": other}, write) != first


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_content_in_parts_is_the_same(write):
    messages = [{"role": "user", "content": [{"type": "text", "text": "what ] is } this"},
                                             {"type": "image_url", "image_url": {"url": "data:,"}}]}]  # fmt: skip
    longer = [*messages, {"role": "assistant", "content": "a picture"}]
    assert session({"messages": longer}, write) == session({"messages": messages}, write)


def test_tool_calls_after_the_first_turn_change_nothing():
    first = [{"role": "user", "content": "do it"}]
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
    }
    result = {"role": "tool", "tool_call_id": "1", "content": "done"}
    assert session({"messages": [*first, call, result]}) == session({"messages": first})


def test_responses_and_messages_bodies_have_sessions_of_their_own():
    """A fallback that read only `messages` made one session of all Responses requests (sub2api#3127)."""
    bodies = [
        {"input": "one"},
        {"input": "two"},
        {"input": [{"role": "user", "content": "one"}]},
        {"instructions": "be brief", "input": "one"},
        {"system": "be brief", "messages": [{"role": "user", "content": "one"}]},
        {"messages": [{"role": "user", "content": "three"}]},
        {"prompt": "four"},
        {"tools": [{"type": "function"}], "messages": [{"role": "user", "content": "one"}]},
    ]
    assert len({session(body) for body in bodies}) == len(bodies)


def test_a_body_without_a_prompt_has_none():
    assert prompt_of(read_object(b'{"model":"m","file":1}').values) is None


def test_the_same_words_of_another_tenant_are_another_session():
    body = {"messages": [{"role": "user", "content": "hello"}]}
    assert session(body, scope=1) != session(body, scope=2)


def test_behind_a_long_shared_system_prompt_the_first_turn_still_tells_sessions_apart():
    turns = FirstTurns()
    system = {"role": "system", "content": "shared " * 14_000}  # 98 KB, more than is hashed
    bodies = [{"messages": [system, {"role": "user", "content": f"task {n}"}]} for n in range(50)]
    assert len({session(body, turns=turns) for body in bodies}) == 50
    longer = {"messages": [*bodies[7]["messages"], {"role": "assistant", "content": "ok"}]}
    assert session(longer, turns=turns) == session(bodies[7], turns=turns)


def test_where_the_first_turn_begins_is_remembered_and_checked():
    turns = FirstTurns()
    for length in (3_000, 5_000, 3_000, 4_000):  # systems of different lengths that begin alike
        system = {"role": "system", "content": "shared " * length}
        body = {"messages": [system, {"role": "user", "content": "x"}]}
        assert session(body, turns=turns) == session(body)


def beginnings(text, scope=0, **more):
    document = read_object(json.dumps({"prompt": text, **more}).encode())
    return prefixes(prompt_of(document.values), scope)


def test_prompts_share_the_beginnings_that_they_share():
    common = "x" * 10_000
    one, sizes = beginnings(common + "a" * 10_000)
    two, _ = beginnings(common + "b" * 10_000)
    shared = [size for size, a, b in zip(sizes, one, two, strict=True) if a == b]
    assert shared[-1] == 8192
    assert len(shared) < len(sizes)


def test_tools_and_tenants_are_part_of_every_beginning():
    plain, _ = beginnings("x" * 2000)
    assert not set(plain) & set(beginnings("x" * 2000, tools=[{"name": "a"}])[0])
    assert not set(plain) & set(beginnings("x" * 2000, scope=5)[0])


def test_a_longer_prompt_has_no_more_beginnings_than_the_cap():
    assert len(beginnings("x" * 70_000)[0]) == len(beginnings("x" * 700_000)[0])
