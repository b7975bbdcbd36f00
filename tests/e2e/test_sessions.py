"""A conversation keeps its replica: which one follows from the session alone, in every worker process."""

import pytest

from tests.e2e.conftest import NARROW_KEY
from tests.e2e.raw import CHAT, MESSAGES, RESPONSES, ask, called

pytestmark = pytest.mark.e2e

HEADERS = [
    "x_session_affinity",
    "x_session_id",
    "session_id",
    "x_claude_code_session_id",
    "x_opencode_session",
]


async def place(gateway, path=CHAT, body=None, **headers):
    """Which endpoint got it, and what the client was told of the session."""
    answer = await ask(gateway, path, called(path, "org/llama-3", **(body or {})), **headers)
    assert answer.status == 200
    return answer.headers["x-headgate-target"], answer.headers["x-headgate-session"]


@pytest.mark.parametrize("header", HEADERS)
async def test_requests_of_one_session_go_to_one_replica(gateway, header):
    """Each on a connection of its own, so that both workers serve some."""
    for session in ("ses_1", "ses_2", "ses_3"):
        places = [await place(gateway, **{header: f"{header} {session}"}) for _ in range(6)]
        assert len({target for target, _ in places}) == 1
        told = [state for _, state in places]
        assert set(told) == {"new", "kept"}
        assert (
            told.count("new") <= 2
        )  # once for each worker: they know of each other's endpoints, not sessions


async def test_sessions_are_spread_over_the_replicas(gateway):
    targets = [(await place(gateway, x_session_affinity=f"session-{n}"))[0] for n in range(24)]
    assert 4 <= targets.count("gpu/0") <= 20


async def test_the_bodys_cache_key_names_the_session_where_no_header_does(gateway):
    for n in range(4):
        key = {"prompt_cache_key": f"thread-{n}"}
        of_key = {(await place(gateway, path, key))[0] for path in (CHAT, RESPONSES) for _ in range(2)}
        assert len(of_key) == 1
    by_header, _ = await place(gateway, body={"prompt_cache_key": "thread-0"}, x_session_affinity="s")
    assert by_header == (await place(gateway, x_session_affinity="s"))[0]


async def test_a_session_is_the_same_in_every_dialect_and_for_every_key_of_a_team(gateway):
    for n in range(4):
        session = {"x_session_affinity": f"agent-{n}"}
        targets = {(await place(gateway, path, **session))[0] for path in (CHAT, RESPONSES, MESSAGES)}
        assert len(targets) == 1


async def test_sessions_of_two_tenants_with_one_name_are_two_sessions(gateway):
    rows = []
    for key in (None, NARROW_KEY):
        more = {"key": key} if key else {}
        answer = await ask(gateway, CHAT, called(CHAT, "org/llama-3"), x_session_affinity="same", **more)
        rows.append(gateway.row(answer.headers["x-request-id"]))
    assert all(row["session_hash"] for row in rows)
    assert rows[0]["session_hash"] != rows[1]["session_hash"]


async def test_requests_without_a_session_go_where_their_first_turn_went(gateway):
    targets = set()
    for n in range(8):
        body = {"messages": [{"role": "user", "content": f"task {n}"}]}
        first, _ = await place(gateway, body=body)
        body["messages"] += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "go on"}]
        assert (await place(gateway, body=body))[0] == first
        targets.add(first)
    assert targets == {"gpu/0", "gpu/1"}


async def test_whoever_opts_out_of_affinity_is_spread(gateway):
    places = [await place(gateway, x_headgate_affinity="none", x_session_id="one") for _ in range(12)]
    assert {target for target, _ in places} == {"gpu/0", "gpu/1"}
    assert {told for _, told in places} == {"none"}


async def test_what_is_no_wish_is_refused(gateway):
    for header in ("x_headgate_affinity", "x_headgate_on_full", "x_headgate_priority"):
        answer = await ask(gateway, CHAT, called(CHAT, "org/llama-3"), **{header: "sometimes"})
        assert answer.status == 400
        assert header.replace("_", "-") in answer.body.decode()
