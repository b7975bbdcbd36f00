"""Who pays for what, by the way a request ended."""

import pytest

from backends.dialect import CHAT, COUNT_TOKENS
from backends.errors import UpstreamError
from backends.tap import Tap
from backends.usage import Usage
from gateway.ledger import Ledger
from gateway.logs import AccessLog
from gateway.settle import Settler
from gateway.telemetry import Telemetry
from policies.placement.hold import Hold
from policies.policy import Hooks, Policy
from policies.price_config import PriceConfig
from policies.prices import PriceBook
from tests.support.builders import a_model, an_exchange, an_unknown_price
from tests.support.ledger_rows import rows_in

PRICE = PriceBook().price(None, "demo", PriceConfig(input=1, cached_input=0.1, output=4))


class Runtime:
    """Only what settle looks at."""

    def __init__(self, *policies: Policy) -> None:
        self.hooks = Hooks(policies)


class Relay:
    """A stream as settle sees it."""

    def __init__(self, *events: bytes, error: UpstreamError | None = None) -> None:
        self.tap = Tap(CHAT, strips_usage=False)
        for event in events:
            self.tap.feed(b"data: " + event + b"\n\n")
        self.error = error


def a_sent_exchange(dialect=CHAT, price=PRICE, **fields):
    model = a_model(price=price)
    exchange = an_exchange(dialect, model=model, body_bytes=400)
    exchange.candidate = model.candidates(CHAT)[0]
    exchange.hold = Hold(exchange.candidate.endpoint, 0)
    exchange.attempts = 1
    exchange.dispatched_at = 1.0
    exchange.status = 200
    for name, value in fields.items():
        setattr(exchange, name, value)
    return exchange


@pytest.fixture
def settled(tmp_path):
    """Settles one exchange through a real ledger and gives its row."""

    async def settle(exchange, relay=None, *policies):
        ledger = Ledger(tmp_path, "w0")
        settler = Settler(ledger, Telemetry(), AccessLog(None, None), "w0")
        settler.open(exchange)
        settler.settle(exchange, Runtime(*policies), relay)
        await settler.idle()
        settler.stop()
        await ledger.stop()
        (row,) = rows_in(tmp_path).values()
        return row

    return settle


async def test_an_answered_request_is_priced_from_its_usage(settled):
    row = await settled(a_sent_exchange(ended="completed", usage=Usage(100, 50, output_tokens=10)))
    assert row.cost_nanousd == 100 * 1000 + 50 * 100 + 10 * 4000
    assert row.saved_nanousd == 50 * 900
    assert not row.is_estimated


async def test_the_load_is_given_back_once_however_it_ended(settled):
    exchange = a_sent_exchange(ended="upstream_failed")
    await settled(exchange)
    assert exchange.candidate.endpoint.in_flight == 0


@pytest.mark.parametrize(
    ("ended", "status"), [("upstream_failed", 502), ("completed", 429), ("completed", 500), ("denied", 403)]
)
async def test_what_the_upstream_did_not_do_costs_nothing(settled, ended, status):
    row = await settled(a_sent_exchange(ended=ended, status=status))
    assert row.cost_nanousd == 0


async def test_counting_tokens_is_free(settled):
    row = await settled(a_sent_exchange(COUNT_TOKENS, ended="completed"))
    assert row.cost_nanousd == 0


async def test_a_model_without_a_price_has_an_unknown_cost_never_zero(settled):
    row = await settled(a_sent_exchange(price=an_unknown_price(), ended="completed", usage=Usage(10)))
    assert row.cost_nanousd is None
    assert row.input_tokens == 10


async def test_an_unstreamed_answer_without_usage_has_an_unknown_cost(settled):
    row = await settled(a_sent_exchange(ended="completed"))
    assert row.cost_nanousd is None


async def test_a_client_that_left_before_the_answer_pays_for_its_prompt_by_estimate(settled):
    row = await settled(a_sent_exchange(ended="client_gone", status=0))
    assert row.status == 499
    assert row.is_estimated
    assert (row.input_tokens, row.output_tokens) == (100, 0)
    assert row.cost_nanousd == 100 * 1000


async def test_a_cut_stream_is_billed_for_what_was_delivered_and_flagged(settled):
    words = [b'{"choices":[{"index":0,"delta":{"content":"some words here "}}]}'] * 20
    row = await settled(
        a_sent_exchange(ended="incomplete", is_stream=True),
        Relay(*words, error=UpstreamError("incomplete", "cut")),
    )
    assert row.is_estimated
    assert row.error_kind == "incomplete"
    assert row.output_tokens >= 20
    assert row.cost_nanousd == 100 * 1000 + row.output_tokens * 4000


async def test_a_stream_that_broke_before_its_first_word_costs_nothing(settled):
    row = await settled(
        a_sent_exchange(ended="incomplete", is_stream=True), Relay(b'{"error":{"message":"engine died"}}')
    )
    assert row.cost_nanousd == 0
    assert row.error_kind == "stream_error"


async def test_a_whole_stream_with_usage_is_billed_by_it(settled):
    usage = b'{"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":5,"total_tokens":35}}'
    row = await settled(a_sent_exchange(ended="completed", is_stream=True), Relay(usage, b"[DONE]"))
    assert not row.is_estimated
    assert row.cost_nanousd == 30 * 1000 + 5 * 4000


async def test_a_request_without_a_known_caller_leaves_no_row(tmp_path):
    ledger = Ledger(tmp_path, "w0")
    settler = Settler(ledger, Telemetry(), AccessLog(None, None), "w0")
    settler.settle(an_exchange(caller=None, ended="denied", status=401), Runtime(), None)
    settler.stop()
    await ledger.stop()
    assert rows_in(tmp_path) == {}


async def test_every_settle_hook_sees_the_cost_and_runs_once(settled):
    seen = []

    class Watches(Policy):
        def settle(self, exchange, now):
            seen.append(exchange.cost_nanousd)

    await settled(a_sent_exchange(ended="completed", usage=Usage(1)), None, Watches())
    assert seen == [1000]
