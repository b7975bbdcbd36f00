import json

import pytest

from backends.adapter import Edits
from backends.dialect import CHAT, COUNT_TOKENS, EMBEDDINGS, MESSAGES, RESPONSES
from backends.pool import Pool
from policies.engine_priority import engine_priority, prioritised, with_priority
from policies.placement.priority import PRIORITIES
from tests.support.builders import a_document, an_exchange

HEAD = b"POST /v1/messages HTTP/1.1\r\nhost: e\r\ncontent-length: 2\r\n\r\n"


def asked(place="default", dialect=CHAT, **body):
    exchange = an_exchange(dialect=dialect, priority=PRIORITIES.index(place))
    exchange.document = a_document(model="m", **body)
    return exchange


def said(edits):
    return None if edits is None else json.loads(b"{%b}" % edits.sets["priority"])["priority"]


def test_a_higher_class_has_a_lower_number_and_the_usual_one_is_what_vllm_takes_for_none():
    assert [engine_priority(place) for place in range(len(PRIORITIES))] == [-20, -10, 0, 10]


def test_a_batch_is_behind_what_is_flex():
    pool, batch = Pool("p", (), priority="class"), asked("bulk")
    batch.is_batch = True
    assert (said(prioritised(asked("bulk"), None, pool)), said(prioritised(batch, None, pool))) == (10, 20)
    batch = asked("bulk", MESSAGES)
    batch.is_batch = True
    assert b"\r\nx-vllm-priority: 20\r\n" in with_priority(HEAD, batch, pool)


@pytest.mark.parametrize("dialect", [CHAT, RESPONSES, EMBEDDINGS], ids=lambda dialect: dialect.name)
def test_the_class_of_a_request_is_in_its_body(dialect):
    assert said(prioritised(asked("interactive", dialect), None, Pool("p", (), priority="class"))) == -10


def test_what_a_client_says_of_its_own_priority_is_replaced():
    pool = Pool("p", (), priority="class")
    assert said(prioritised(asked("bulk", priority=-1000), None, pool)) == 10
    assert said(prioritised(asked("default", priority=-1000), None, pool)) == 0


def test_a_client_may_say_it_where_the_pool_lets_it():
    pool = Pool("p", (), priority="client")
    assert prioritised(asked("bulk", priority=-1000), None, pool) is None
    assert said(prioritised(asked("bulk"), None, pool)) == 10


def test_a_body_is_left_alone_where_there_is_nothing_to_say():
    assert prioritised(asked("default"), None, Pool("p", (), priority="class")) is None
    assert prioritised(asked("bulk", priority=5), None, Pool("p", ())) is None
    assert prioritised(asked("bulk", COUNT_TOKENS), None, Pool("p", (), priority="class")) is None


def test_a_rule_has_the_last_word_and_its_other_changes_stay():
    pool = Pool("p", (), priority="class")
    ruled = Edits(frozenset(), {"priority": b'"priority":3'})
    assert prioritised(asked("bulk"), ruled, pool) is ruled
    other = Edits(frozenset({"top_p", "priority"}), {"n": b'"n":1'}, {"x": b'"x":1'})
    found = prioritised(asked("bulk"), other, pool)
    assert found == Edits(
        frozenset({"top_p"}), {"n": b'"n":1', "priority": b'"priority":10'}, {"x": b'"x":1'}
    )


def test_an_anthropic_request_says_it_in_a_header():
    pool = Pool("p", (), priority="class")
    exchange = asked("interactive", MESSAGES)
    assert prioritised(exchange, None, pool) is None
    head = with_priority(HEAD, exchange, pool)
    assert head == HEAD.removesuffix(b"\r\n") + b"x-vllm-priority: -10\r\n\r\n"
    assert with_priority(HEAD, exchange, Pool("p", ())) == HEAD
    assert with_priority(HEAD, asked("interactive"), pool) == HEAD
