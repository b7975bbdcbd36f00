"""How the supervisor asks an engine, against a server that answers as it is told."""

import socket
from collections.abc import AsyncIterator

import pytest
from aiohttp import web

from local_engine.plan import EngineEndpoint
from local_engine.probing import HttpProber, read_work
from local_engine.surroundings import Work
from tests.support.scripted_engine import a_plan

PAGE = """# HELP vllm:num_requests_running Running.
vllm:num_requests_running{engine="0",model_name="tiny"} 2.0
vllm:num_requests_running{engine="1",model_name="tiny"} 0.0
vllm:num_requests_waiting{engine="0",model_name="tiny"} 3.0
vllm:num_requests_waiting{engine="1",model_name="tiny"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 3.0
vllm:iteration_tokens_total_sum{engine="0",model_name="tiny"} 1000.0
vllm:iteration_tokens_total_bucket{engine="0",le="1.0"} 7.0
vllm:generation_tokens_total{engine="0",model_name="tiny"} 1.5e+03
vllm:generation_tokens_created{engine="0",model_name="tiny"} 1.79e+09
vllm:prompt_tokens_total{engine="1",model_name="tiny"} 40.0
process_open_fds 30.0
"""


class Engine:
    """`answers` by path; what was asked is kept."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, str]] = {"/health": (200, ""), "/metrics": (200, PAGE)}
        self.asked: list[tuple[str, str, str, object]] = []

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        authorization = request.headers.get("authorization", "")
        self.asked.append((request.method, request.path_qs, authorization, body))
        status, text = self.answers.get(request.path, (404, "nothing here"))
        return web.Response(status=status, text=text)


@pytest.fixture
async def engine() -> AsyncIterator[tuple[Engine, int]]:
    engine = Engine()
    runner = web.ServerRunner(web.Server(engine.answer))
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    yield engine, listener.getsockname()[1]
    await runner.cleanup()


@pytest.fixture
async def prober() -> AsyncIterator[HttpProber]:
    prober = HttpProber()
    yield prober
    await prober.close()


def plan_at(port: int, **changes):
    endpoint = EngineEndpoint("gpu/0", f"http://127.0.0.1:{port}/v1", None, "0")
    return a_plan(port=port, endpoints=(endpoint,), **changes)


async def test_one_token_is_asked_for_with_the_engines_key(engine, prober):
    server, port = engine
    server.answers["/v1/completions"] = (200, "{}")
    assert await prober.generate(plan_at(port)) == ""
    body = {"model": "tiny", "prompt": "1", "max_tokens": 1}
    assert server.asked == [("POST", "/v1/completions", "Bearer k", body)]


async def test_one_vector_of_an_engine_that_embeds(engine, prober):
    server, port = engine
    server.answers["/v1/embeddings"] = (200, "{}")
    assert await prober.generate(plan_at(port, probes_embedding=True)) == ""
    assert server.asked[0][1] == "/v1/embeddings"


@pytest.mark.parametrize("status", [401, 429, 500, 503])
async def test_what_does_not_generate_is_not_ready_and_says_why(engine, prober, status):
    server, port = engine
    server.answers["/v1/completions"] = (status, "because")
    assert await prober.generate(plan_at(port)) == f"{status}: because"


async def test_an_engine_without_the_route_is_believed(engine, prober):
    assert await prober.generate(plan_at(engine[1])) == ""


async def test_work_is_read_by_engine_and_silence_is_none(engine, prober):
    server, port = engine
    work = await prober.work(plan_at(port))
    assert work == {"0/0": Work(5, 2500.0), "0/1": Work(0, 40.0)}
    server.answers["/metrics"] = (500, "")
    assert await prober.work(plan_at(port)) is None
    assert read_work("nothing\n") == {}


async def test_sleep_and_waking_are_asked_and_a_refusal_is_told(engine, prober):
    server, port = engine
    server.answers["/sleep"] = (200, "")
    assert await prober.sleep(plan_at(port))
    assert server.asked[-1][:2] == ("POST", "/sleep?level=1")
    assert not await prober.wake(plan_at(port))


async def test_nobody_there_is_no_exception(prober):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        plan = plan_at(bound.getsockname()[1])
        assert not await prober.is_up(plan)
        assert await prober.generate(plan) == "ClientConnectorError"
        assert await prober.work(plan) is None
