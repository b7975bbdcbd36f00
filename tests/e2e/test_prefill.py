"""Prompts computed by one engine and answered by another, through the real gateway, with real (simulated) engines."""

import asyncio
import itertools
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.gateway_process import KEY, Gateway
from tests.support.simulator_process import SimulatorProcess

pytestmark = pytest.mark.e2e

CONNECTOR = json.dumps({"kv_connector": "NixlConnector", "kv_role": "kv_both"})
LONG = "The ledger keeps one row for each request, and the spillway opens when there is too much water. " * 20
LONGER = (
    "Then there is more of it, and it is new to everybody who has not seen it before today at noon. " * 20
)
PRICE = {"input": 1.0, "cached_input": 0.1, "output": 4.0}
_numbers = itertools.count()


class Split:
    """One engine that computes prompts, two that answer, and the gateway before them."""

    def __init__(self, gateway: Gateway, engines: list[SimulatorProcess]) -> None:
        self.gateway = gateway
        self.prefill, *self.decode = engines
        self.client = openai.OpenAI(base_url=gateway.base_url, api_key=KEY, max_retries=0, timeout=60)

    def ask(self, text: str = "", session: str = "", **fields: Any) -> Any:
        """A chat that nobody has seen before, unless it has a text."""
        text = text or f"{next(_numbers)} {LONG}"
        given = {"model": "m", "max_tokens": 8, **fields}
        headers = {"x-session-affinity": session or f"s{next(_numbers)}"}
        return self.client.chat.completions.with_raw_response.create(
            messages=[{"role": "user", "content": text}], extra_headers=headers, **given
        )

    def row(self, raw: Any) -> dict[str, Any]:
        return self.gateway.row(raw.headers["x-request-id"], within_s=30)

    def outcomes(self) -> dict[str, float]:
        found = self.gateway.metrics()
        label = re.compile(r'headgate_prefills_total\{.*outcome="(\w+)"')
        return {told[1]: value for name, value in found.items() if (told := label.match(name))}

    def held(self) -> float:
        return self.prefill.metrics()["kv_cache_usage_perc"]

    def computed(self, engine: SimulatorProcess) -> float:
        return engine.metrics()['prompt_tokens_by_source_total{source="local_compute"}']


def a_gateway(
    directory: Any, engines: list[SimulatorProcess], mutant: str = "", hasty_s: float = 0.0
) -> Gateway:
    """The pool `gpu` and the model `m`; with `hasty_s` the model `hasty` too, of a pool that waits no longer for a prompt."""
    pool = {
        "type": "simulator",
        "endpoints": [f"{engine.url}/v1" for engine in engines],
        "roles": ["prefill", *["decode"] * (len(engines) - 1)],
        "prefill": {"least_tokens": 100, "timeout_s": 60.0},
        # A test's own failures are to be seen by the next request, too.
        "health": {"failures": 0, "retry_floor": 1000, "probe": "none", "scrape": "none"},
    }
    pools = {"gpu": pool}
    models = {"m": {"targets": [{"pool": "gpu", "model": "demo"}], "price": PRICE}}
    if hasty_s:
        pools["hasty"] = pool | {"prefill": {**pool["prefill"], "timeout_s": hasty_s}}
        models["hasty"] = {"targets": [{"pool": "hasty", "model": "demo"}], "price": PRICE}
    broken: dict[str, Any] = {}
    if mutant:
        broken = {"module": "tests.mutants.gateway", "environ": {"HEADGATE_TEST_MUTANT": mutant}}
    return Gateway(directory, pools=pools, models=models, logging={"access": False}, **broken)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Split]:
    options = {"kv_transfer_config": CONNECTOR, "allow_faults": True}
    with (
        SimulatorProcess(**options) as prefill,
        SimulatorProcess(**options) as first,
        SimulatorProcess(**options) as second,
    ):
        engines = [prefill, first, second]
        with a_gateway(tmp_path_factory.mktemp("split"), engines, hasty_s=1.0) as gateway:
            yield Split(gateway, engines)
            log = gateway.log()
        assert "Traceback" not in log, log[-4000:]


@pytest.fixture(autouse=True)
def _well(split: Split) -> Iterator[None]:
    yield
    for engine in (split.prefill, *split.decode):
        if engine.process.poll() is None:
            engine.fault(None)


def until(is_so: Any, within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline, "not so in time"
        time.sleep(0.02)


def test_a_long_prompt_is_computed_by_one_engine_and_answered_by_another(split):
    before = [split.computed(engine) for engine in split.decode]
    raw = split.ask()
    answer, row = raw.parse(), split.row(raw)
    assert raw.headers["x-headgate-prefill"] == "gpu/0"
    assert raw.headers["x-headgate-target"] in {"gpu/1", "gpu/2"}
    assert raw.headers["x-headgate-attempts"] == "1"
    assert [split.computed(engine) for engine in split.decode] == before
    assert (row["prefill_endpoint"], row["endpoint"]) == ("gpu/0", raw.headers["x-headgate-target"])
    assert row["prefill_us"] > 0
    assert (row["attempts"], row["failed_attempts"], row["wasted_nanousd"]) == (1, "[]", 0)
    assert row["input_tokens"] == answer.usage.prompt_tokens
    assert row["output_tokens"] == 8
    assert row["cost_nanousd"] == row["input_tokens"] * 1000 + 8 * 4000
    until(lambda: split.held() == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_billed_from_the_decode_answer_alone(split, stream):
    """The engine that computes has seen the beginning, the one that answers has not."""
    text = f"{next(_numbers)} {LONG}"
    split.ask(text)
    fields = {"stream": True} if stream else {}
    raw = split.ask(text + LONGER, **fields)
    if stream:
        list(raw.parse())
    row = split.row(raw)
    assert row["prefill_endpoint"] == "gpu/0"
    assert row["cache_read_tokens"] > 300
    assert row["cost_nanousd"] == row["input_tokens"] * 1000 + row["cache_read_tokens"] * 100 + 8 * 4000
    assert (row["is_estimated"], row["ended"]) == (0, "completed")


def test_the_text_is_that_of_one_engine_alone(split):
    text = f"{next(_numbers)} {LONG}"
    apart = split.ask(text).parse().choices[0].message.content
    streamed = list(split.ask(text + " ", stream=True).parse())
    with openai.OpenAI(base_url=f"{split.decode[0].url}/v1", api_key="-") as alone:
        for said, asked in (
            (apart, text),
            ("".join(c.delta.content or "" for e in streamed for c in e.choices), text + " "),
        ):
            whole = alone.chat.completions.create(
                model="demo", max_tokens=8, messages=[{"role": "user", "content": asked}]
            )
            assert said == whole.choices[0].message.content


def test_every_dialect_of_a_prompt_may_be_computed_apart(split):
    text, sdk = f"{next(_numbers)} {LONG}", split.client
    answers = [
        sdk.completions.with_raw_response.create(model="m", prompt="c" + text, max_tokens=8),
        sdk.responses.with_raw_response.create(model="m", input="r" + text, max_output_tokens=8),
    ]
    assert [raw.headers["x-headgate-prefill"] for raw in answers] == ["gpu/0", "gpu/0"]
    body = {"model": "m", "max_tokens": 8, "messages": [{"role": "user", "content": "m" + text}]}
    status, headers, _ = split.gateway.post("/v1/messages", body)
    assert (status, headers["x-headgate-prefill"]) == (200, "gpu/0")


def test_a_short_rest_is_computed_where_it_is_answered(split):
    assert "x-headgate-prefill" not in split.ask("hello").headers
    text = f"{next(_numbers)} {LONG}"
    first = split.ask(text, "agent")
    second = split.ask(text + " and then?", "agent")  # nearly all of it is where the first was answered
    assert "x-headgate-prefill" in first.headers
    assert "x-headgate-prefill" not in second.headers
    row = split.row(second)
    assert row["endpoint"] == split.row(first)["endpoint"]
    assert row["cache_read_tokens"] > 300
    assert split.outcomes()["short"] >= 2


def test_several_answers_to_a_prompt_are_made_where_it_is_computed(split):
    assert "x-headgate-prefill" not in split.ask(n=2).headers
    many = split.client.completions.with_raw_response.create(model="m", prompt=[LONG, LONG], max_tokens=2)
    assert "x-headgate-prefill" not in many.headers


def test_a_clients_own_params_reach_no_engine(split):
    mine = {"do_remote_prefill": True, "remote_request_id": "somebody-elses", "remote_engine_id": "x"}
    for text in ("short", f"{next(_numbers)} {LONG}"):
        raw = split.ask(text, extra_body={"kv_transfer_params": mine})
        assert raw.headers["x-headgate-attempts"] == "1"
        assert json.loads(split.row(raw)["failed_attempts"]) == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("status=503", "503"),
        ("status=400", "400"),
        ("status=500", "500"),
        ("reset", "reset"),
        ("hang", "total_timeout"),
    ],
)
def test_when_the_prompt_is_not_computed_elsewhere_it_is_where_it_is_answered(split, fault, reason, stream):
    # A kept connection that is reset is tried once more on a fresh one.
    split.prefill.fault(fault, 2 if fault == "reset" else 1)
    model, prefiller = ("hasty", "hasty/0") if fault == "hang" else ("m", "gpu/0")
    raw = split.ask(stream=stream, model=model)
    if stream:
        assert list(raw.parse())
    row = split.row(raw)
    assert (row["ended"], row["status"], row["attempts"], row["prefill_endpoint"]) == (
        "completed",
        200,
        1,
        "",
    )
    ((endpoint, why, took_us, _),) = json.loads(row["failed_attempts"])
    assert (endpoint, why) == (prefiller, reason)
    assert took_us > 0
    assert "x-headgate-prefill" not in raw.headers
    until(lambda: split.held() == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("refusal", ["status=400", "status=500"])
def test_an_engine_that_refuses_what_was_computed_is_asked_without_it(split, refusal, stream):
    for engine in split.decode:
        engine.fault(refusal, 1)
    raw = split.ask(stream=stream)
    if stream:
        assert list(raw.parse())
    row = split.row(raw)
    assert (row["ended"], row["status"], row["attempts"], row["prefill_endpoint"]) == (
        "completed",
        200,
        2,
        "",
    )
    reasons = {(endpoint, reason) for endpoint, reason, _, _ in json.loads(row["failed_attempts"])}
    assert reasons == {("gpu/0", "unused"), (row["endpoint"], refusal.removeprefix("status="))}
    assert row["wasted_nanousd"] > 0
    assert raw.headers["x-headgate-attempts"] == "2"
    until(lambda: split.held() == 0)


async def test_a_client_that_leaves_while_its_prompt_is_computed_stops_that(split):
    split.prefill.fault("hang", 1)
    async with openai.AsyncOpenAI(base_url=split.gateway.base_url, api_key=KEY, max_retries=0) as sdk:
        call = asyncio.ensure_future(
            sdk.chat.completions.create(
                model="m",
                messages=[{"role": "user", "content": f"{next(_numbers)} {LONG}"}],
                extra_headers={"x-headgate-tags": "left-early"},
            )
        )
        computing = 'headgate_requests_in_flight{endpoint="gpu/0"}'
        await asyncio.to_thread(until, lambda: split.gateway.metrics().get(computing) == 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)

    def rows():
        return [row for row in split.gateway.rows() if row["tags"] == '["left-early"]']

    await asyncio.to_thread(until, lambda: len(rows()) == 1)
    (row,) = rows()
    assert (row["ended"], row["status"]) == ("client_gone", 499)
    assert split.held() == 0


async def test_a_client_that_leaves_between_the_calls_leaves_nothing_held(split):
    for engine in split.decode:
        engine.fault("hang", 1)  # before what was computed is collected
    async with openai.AsyncOpenAI(base_url=split.gateway.base_url, api_key=KEY, max_retries=0) as sdk:
        call = asyncio.ensure_future(
            sdk.chat.completions.create(
                model="m", messages=[{"role": "user", "content": f"{next(_numbers)} {LONG}"}]
            )
        )
        await asyncio.to_thread(until, lambda: split.held() > 0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    await asyncio.to_thread(until, lambda: split.held() == 0, 20.0)  # long before the lease ends


@pytest.mark.parametrize("stream", [False, True])
def test_the_engine_that_computed_is_killed_between_the_calls_and_the_request_succeeds(tmp_path, stream):
    options = {"kv_transfer_config": CONNECTOR, "allow_faults": True}
    with (
        SimulatorProcess(**options) as prefill,
        SimulatorProcess(**options) as decode,
        a_gateway(tmp_path, [prefill, decode]) as gateway,
    ):
        split = Split(gateway, [prefill, decode])
        prefill.fault("exit", 1)
        raw = split.ask(stream=stream)
        if stream:
            events = list(raw.parse())
            assert events[-1].choices[0].finish_reason == "length"
        row = split.row(raw)
        assert prefill.process.wait(30) != 0
        assert (row["ended"], row["status"], row["attempts"]) == ("completed", 200, 2)
        assert row["output_tokens"] == 8
        assert (row["prefill_endpoint"], row["endpoint"]) == ("", "gpu/1")
        again = split.row(split.ask())  # nobody answers there any more
        assert (again["status"], again["attempts"]) == (200, 1)
        assert json.loads(again["failed_attempts"])[0][:2] == ["gpu/0", "connect"]


def test_a_build_that_fails_with_the_engine_that_computed_is_caught(tmp_path):
    options = {"kv_transfer_config": CONNECTOR, "allow_faults": True}
    with (
        SimulatorProcess(**options) as prefill,
        SimulatorProcess(**options) as decode,
        a_gateway(tmp_path, [prefill, decode], "fails_with_the_engine_that_computed") as gateway,
    ):
        prefill.fault("exit", 1)
        with pytest.raises(openai.APIStatusError):
            Split(gateway, [prefill, decode]).ask()
