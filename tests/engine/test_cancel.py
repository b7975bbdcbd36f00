"""A client that leaves stops the real engine: in the middle of a stream, before its first byte, and without a stream.

That it stops is told by what it has computed, which no busy machine changes. How soon is printed; the aim is 250 ms.
"""

import asyncio
import functools
import secrets
import statistics
import time

import pytest

from tests.engine.calls import ENDLESS, ENDLESS_TOKENS, LONG, ask, occupy, until

pytestmark = pytest.mark.engine

ROUNDS = 5
LIMIT_S = 2.5  # ten times the aim


def work(replicas):
    return sum(
        replica.metric("num_requests_running") + replica.metric("num_requests_waiting")
        for replica in replicas
    )


def total(replicas, name):
    return sum(replica.metric(name) for replica in replicas)


async def wait_until(is_so):
    return await asyncio.to_thread(until, is_so)


class Delays:
    """From a client's leaving to an engine that has stopped.

    An engine that was asked and still at it was so at some moment after the question: no sooner than `least_s` it stopped.
    """

    def __init__(self):
        self.least_s, self.most_s = [], []

    def measure(self, is_over):
        began_at = asked_at = time.perf_counter()
        least_s = 0.0

        def looked():
            nonlocal asked_at, least_s
            least_s, asked_at = asked_at - began_at, time.perf_counter()
            return is_over()

        until(looked)
        self.least_s.append(least_s)
        self.most_s.append(time.perf_counter() - began_at)

    def report(self, capsys, phase):
        milliseconds = [f"{1000 * each:.0f}" for each in sorted(self.most_s)]
        with capsys.disabled():
            print(
                f"\n    {phase}: the engine had stopped after {1000 * statistics.median(self.most_s):.0f} ms "
                f"(median of {', '.join(milliseconds)})"
            )
        assert statistics.median(self.least_s) < LIMIT_S, (self.least_s, self.most_s)


def test_closing_a_stream_midway_stops_the_engine(client, gateway, replicas, capsys):
    delays = Delays()
    before = total(replicas, "generation_tokens_total")
    for _ in range(ROUNDS):
        stream = ask(client, stream=True, **ENDLESS)
        next(stream)
        until(lambda: work(replicas) == 1)
        stream.close()
        delays.measure(lambda: work(replicas) == 0)
        row = gateway.row(stream.response.headers["x-request-id"])
        assert (row["ended"], row["status"], row["is_estimated"]) == ("client_gone", 200, 1)
        assert row["cost_nanousd"] > 0
    assert total(replicas, "generation_tokens_total") - before < ROUNDS * ENDLESS_TOKENS / 2
    delays.report(capsys, "a stream left midway")


async def test_leaving_an_answer_that_is_not_streamed_stops_the_engine(
    async_client, gateway, replicas, capsys
):
    delays = Delays()
    tag = secrets.token_hex(4)  # of its own each time it is run
    tagged = async_client.with_options(default_headers={"x-headgate-tags": tag})
    before = total(replicas, "generation_tokens_total")
    for _ in range(ROUNDS):
        call = asyncio.ensure_future(ask(tagged, **ENDLESS))
        await wait_until(lambda: work(replicas) == 1)
        call.cancel()
        await asyncio.to_thread(delays.measure, lambda: work(replicas) == 0)
        await asyncio.gather(call, return_exceptions=True)
    assert total(replicas, "generation_tokens_total") - before < ROUNDS * ENDLESS_TOKENS / 2
    delays.report(capsys, "an answer left while it was made")
    assert_withdrawn(gateway, tag, 499)


@pytest.mark.parametrize("is_stream", [True, False], ids=["stream", "whole"])
async def test_leaving_the_engines_queue_gives_the_place_back(
    async_client, gateway, replicas, capsys, is_stream, sessions
):
    """Four run, the fifth waits. Of a stream the engine sends the head at once, and then nothing: it is not relayed yet."""
    queued = functools.partial(replicas[0].metric, "num_requests_waiting")
    tag = secrets.token_hex(4)
    tagged = async_client.with_options(default_headers={"x-headgate-tags": tag})
    streams = await occupy(async_client, sessions[0], 4)
    delays = Delays()
    try:
        before = total(replicas, "prompt_tokens_total")
        for _ in range(ROUNDS):
            call = asyncio.ensure_future(ask(tagged, LONG, sessions[0], stream=is_stream, **ENDLESS))
            await wait_until(lambda: queued() == 1)
            call.cancel()
            await asyncio.to_thread(delays.measure, lambda: queued() == 0)
            await asyncio.gather(call, return_exceptions=True)
        assert total(replicas, "prompt_tokens_total") == before, "one that waited had its turn"
    finally:
        for stream in streams:
            await stream.close()
    await wait_until(lambda: work(replicas) == 0)
    delays.report(capsys, f"{'a stream' if is_stream else 'an answer'} left before its first byte")
    assert_withdrawn(gateway, tag, 499)


def assert_withdrawn(gateway, tag, status):
    """Nothing was relayed: the rows have the prompt's estimate and no output."""

    def rows():
        return [row for row in gateway.rows() if row["tags"] == f'["{tag}"]']

    until(lambda: len(rows()) == ROUNDS)
    for row in rows():
        assert (row["ended"], row["status"], row["is_estimated"]) == ("client_gone", status, 1)
        assert (row["ttft_us"], row["output_tokens"]) == (None, 0)
        assert row["input_tokens"] > 0
        assert row["cost_nanousd"] == row["input_tokens"] * 1000
