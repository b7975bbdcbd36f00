"""What a request for a response in the background is told before there is one."""

from types import SimpleNamespace
from typing import Any, cast

from gateway.overflow.background_answer import BackgroundPark
from gateway.overflow.store import StoreAwayError


class AwayEndpoints:
    async def names(self, *_: str) -> str:
        raise StoreAwayError("no answer in time")


async def test_while_receivers_cannot_be_asked_for_it_is_told_to_come_again():
    park = BackgroundPark(cast("Any", None), cast("Any", AwayEndpoints()))
    exchange = SimpleNamespace(caller=SimpleNamespace(tenant="t1"))
    message = SimpleNamespace(document=SimpleNamespace(values={"background": True}))
    denial = await park.accept(*cast("Any", (exchange, SimpleNamespace(headers={}), message)))
    assert denial is not None
    assert denial.status == 503
