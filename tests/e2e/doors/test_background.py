"""Responses in the background, as the official SDK uses them: polled, cancelled, deleted, streamed and taken up again."""

import json
import time

import openai
import pytest

from tests.support import recordings
from tests.support.scripted_upstream import Answer

pytestmark = pytest.mark.e2e

EVENTS = recordings.response_events()
ENDED = {"completed", "failed", "cancelled", "incomplete"}


def create(doors, **more):
    return doors.client.responses.create(**{"model": "half", "input": "hi", "background": True} | more)


def ended(doors, response_id):
    return doors.until(
        lambda: doors.client.responses.retrieve(response_id), lambda found: found.status in ENDED
    )


def numbered(stream):
    return [(event.sequence_number, event.type) for event in stream]


def in_order(events):
    """Each once, and as every later reading gives them."""
    numbers = [number for number, _ in events]
    return numbers == sorted(set(numbers))


def rows_of(doors, response_id):
    doors.gateway.row(response_id, within_s=60)
    return [row for row in doors.gateway.rows() if row["request_id"] == response_id]


def test_a_response_is_queued_at_once_and_polled_to_its_end(doors):
    gate = doors.thread.gate()
    doors.upstream.script("responses", Answer.of_json(recordings.response()).gate_after(0, gate))
    made = create(doors, metadata={"a": "b"}, max_output_tokens=50, instructions="be brief")
    assert (made.status, made.background, made.output, made.error) == ("queued", True, [], None)
    assert (made.metadata, made.max_output_tokens, made.model) == ({"a": "b"}, 50, "half")
    doors.until(lambda: doors.client.responses.retrieve(made.id), lambda found: found.status == "in_progress")
    gate.set()
    response = ended(doors, made.id)
    assert (response.id, response.status, response.background) == (made.id, "completed", True)
    assert response.output_text == "Hello from upstream"
    assert response.created_at == made.created_at
    (row,) = rows_of(doors, made.id)
    assert (row["price_source"], row["dialect"]) == ("config x 0.5", "responses")
    assert row["cost_nanousd"] > 0
    sent = doors.upstream.last.fields
    assert "background" not in sent
    assert (sent["instructions"], sent["max_output_tokens"]) == ("be brief", 50)


def test_a_stream_has_every_event_once_under_our_id_and_can_be_read_again_for_nothing(doors):
    doors.upstream.script("responses", Answer.of_events(EVENTS))
    stream = create(doors, stream=True)
    events = list(stream)
    assert in_order([(event.sequence_number, event.type) for event in events])
    kinds = [event.type for event in events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    response_id = events[0].response.id
    assert response_id.startswith("resp_")
    assert {event.response.id for event in events if hasattr(event, "response")} == {response_id}
    whole = [(event.sequence_number, event.type) for event in events]
    retrieve = doors.client.responses.retrieve
    for after in (0, 1, 2, 5, len(EVENTS) - 1):
        again = numbered(retrieve(response_id, stream=True, starting_after=after))
        assert again == [event for event in whole if event[0] > after]
    assert numbered(retrieve(response_id, stream=True)) == whole
    assert numbered(retrieve(response_id, stream=True, starting_after=whole[-1][0])) == []
    assert numbered(retrieve(response_id, stream=True, starting_after=9_999)) == []
    resumed = retrieve(response_id, stream=True, extra_headers={"Last-Event-ID": "3"})
    assert numbered(resumed) == [event for event in whole if event[0] > 3]
    assert retrieve(response_id).output_text == "Hello from upstream"
    assert len(rows_of(doors, response_id)) == 1
    # A busy machine may let a lease lapse, so that it is run again; reading never is a run.
    if len(doors.upstream.journal) == 1:
        assert [number for number, _ in whole] == list(range(len(EVENTS) + 1))


def test_a_stream_that_was_left_goes_on_and_is_taken_up_while_it_runs(doors):
    gate = doors.thread.gate()
    doors.upstream.script("responses", Answer.of_events(EVENTS).gate_after(5, gate))
    stream = create(doors, stream=True)
    first = next(iter(stream))
    response_id = first.response.id
    seen = [(first.sequence_number, first.type)]
    for event in stream:
        seen.append((event.sequence_number, event.type))
        if event.sequence_number == 4:
            break
    stream.close()
    resumed = doors.client.responses.retrieve(response_id, stream=True, starting_after=4)
    head = next(iter(resumed))
    assert head.sequence_number == 5
    gate.set()
    rest = [(head.sequence_number, head.type), *numbered(resumed)]
    assert rest[-1][1] == "response.completed"
    assert in_order(seen + rest)
    assert seen + rest == numbered(doors.client.responses.retrieve(response_id, stream=True))
    assert len(rows_of(doors, response_id)) == 1


def test_a_run_that_broke_off_begins_again_and_the_numbers_go_on(doors):
    gate = doors.thread.gate()
    broken = Answer.of_events(EVENTS).reset_after(5).gate_after(4, gate)
    doors.upstream.script("responses", broken, Answer.of_events(EVENTS))
    events = []
    for event in create(doors, stream=True):
        events.append(event)
        if event.sequence_number == 3:
            gate.set()  # something of the first run has been said
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))
    kinds = [event.type for event in events]
    last_run = len(kinds) - 1 - kinds[::-1].index("response.created")
    assert kinds[last_run:] == [json.loads(event.split(b"data: ")[1])["type"] for event in EVENTS]
    assert kinds.count("response.completed") == 1
    response_id = events[0].response.id
    again = numbered(doors.client.responses.retrieve(response_id, stream=True))
    assert again == [(event.sequence_number, event.type) for event in events]
    (row,) = rows_of(doors, response_id)
    assert (row["attempts"], row["ended"]) == (2, "completed")


def test_cancelling_stops_the_upstream_and_ends_the_stream(doors):
    gate = doors.thread.gate()
    doors.upstream.script("responses", Answer.of_events(EVENTS).gate_after(4, gate))
    stream = create(doors, stream=True)
    events = iter(stream)
    response_id = next(events).response.id
    while next(events).sequence_number < 3:
        pass
    cancelled = doors.client.responses.cancel(response_id)
    assert cancelled.status == "cancelled"
    assert doors.upstream.wait_end(doors.upstream.last) == "peer gone"
    last = list(events)[-1]
    assert (last.type, last.response.status) == ("response.failed", "cancelled")
    assert doors.client.responses.cancel(response_id).status == "cancelled"
    again = list(doors.client.responses.retrieve(response_id, stream=True))
    assert (again[-1].sequence_number, again[-1].type) == (last.sequence_number, "response.failed")
    assert not list(
        doors.client.responses.retrieve(response_id, stream=True, starting_after=last.sequence_number)
    )
    gate.set()


def test_a_queued_response_is_cancelled_for_free(doors):
    # Claimed or not, nothing of it may be billed that was not sent.
    doors.upstream.script("responses", Answer.of_json(recordings.response()).hang_before_head())
    made = create(doors)
    assert doors.client.responses.cancel(made.id).status == "cancelled"
    assert doors.client.responses.retrieve(made.id).status == "cancelled"


def test_a_response_that_fails_says_why(doors):
    doors.upstream.script("responses", Answer.of_error(400))
    response = ended(doors, create(doors).id)
    assert (response.status, response.error.code) == ("failed", "invalid_prompt")
    assert response.error.message
    stream = list(create(doors, stream=True))
    assert stream[-1].type == "response.failed"
    assert stream[-1].response.error.code == "invalid_prompt"


def test_an_answer_that_stopped_early_is_incomplete(doors):
    doors.upstream.script("responses", Answer.of_json(recordings.response(status="incomplete")))
    assert ended(doors, create(doors).id).status == "incomplete"


def test_a_deleted_response_is_gone(doors):
    made = create(doors)
    ended(doors, made.id)
    doors.client.responses.delete(made.id)
    for ask in (
        doors.client.responses.retrieve,
        doors.client.responses.delete,
        doors.client.responses.cancel,
    ):
        with pytest.raises(openai.NotFoundError):
            ask(made.id)


def test_a_response_is_its_tenants_own(doors):
    made = create(doors)
    for ask in (doors.other.responses.retrieve, doors.other.responses.delete, doors.other.responses.cancel):
        with pytest.raises(openai.NotFoundError) as refused:
            ask(made.id)
        assert refused.value.code == "response_not_found"
    assert ended(doors, made.id).status == "completed"


def test_what_makes_no_sense_is_refused(doors):
    with pytest.raises(openai.BadRequestError) as refused:
        create(doors, store=False)
    assert refused.value.param == "store"
    with pytest.raises(openai.NotFoundError) as refused:
        create(doors, model="nowhere")
    assert refused.value.code == "model_not_found"
    made = create(doors)
    with pytest.raises(openai.BadRequestError) as refused:
        doors.client.responses.retrieve(made.id, stream=True)
    assert refused.value.code == "not_streamed"
    streamed = next(iter(create(doors, stream=True))).response.id
    with pytest.raises(openai.BadRequestError) as refused:
        doors.client.responses.retrieve(streamed, stream=True, extra_query={"starting_after": "x"})
    assert refused.value.param == "starting_after"
    ended(doors, made.id)


def test_a_response_continues_one_that_ran_in_the_background(doors):
    first = create(doors)
    ended(doors, first.id)
    upstream_id = recordings.response()["id"]
    second = create(doors, previous_response_id=first.id)
    assert ended(doors, second.id).status == "completed"
    assert doors.upstream.last.fields["previous_response_id"] == upstream_id


def test_an_ordinary_response_is_answered_as_ever(doors):
    response = doors.client.responses.create(model="half", input="hi")
    assert (response.status, response.output_text) == ("completed", "Hello from upstream")
    response = doors.client.responses.create(model="half", input="hi", background=False)
    assert response.status == "completed"


def test_a_repeated_request_with_one_idempotency_key_is_one_response(doors):
    headers = {"Idempotency-Key": f"once-{time.time_ns()}"}
    made = {create(doors, extra_headers=headers).id for _ in range(3)}
    assert len(made) == 1
    assert ended(doors, made.pop()).status == "completed"


def test_the_raw_stream_has_names_ids_and_numbers(doors):
    doors.upstream.script("responses", Answer.of_events(EVENTS).crlf().split(7))
    _, headers, body = doors.gateway.post(
        "/v1/responses", {"model": "half", "input": "hi", "background": True, "stream": True}
    )
    assert headers["content-type"] == "text/event-stream"
    assert headers["x-headgate-job"].startswith("resp_")
    for event in body.decode().split("\n\n")[:-1]:
        if event.startswith(":"):
            continue
        name, identity, data = event.split("\n")
        found = json.loads(data.removeprefix("data: "))
        assert name == f"event: {found['type']}"
        assert identity == f"id: {found['sequence_number']}"
