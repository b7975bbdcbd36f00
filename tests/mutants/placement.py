"""Broken builds of load counting: what a request took is not given back on one way out."""

from gateway.settle import Settler
from policies.placement.hold import Hold


def keeps_the_load_of_clients_that_left() -> None:
    settle = Settler.settle

    def leaky(self, exchange, runtime, relay):
        if exchange.ended == "client_gone":
            exchange.hold = None
        settle(self, exchange, runtime, relay)

    Settler.settle = leaky


def gives_back_requests_but_no_tokens() -> None:
    def leaky(self):
        if self._endpoint is not None:
            self._endpoint.in_flight -= 1
            self._endpoint = None

    Hold.prefilled = lambda self: None
    Hold.release = leaky


MUTANTS = {
    mutant.__name__: mutant
    for mutant in (keeps_the_load_of_clients_that_left, gives_back_requests_but_no_tokens)
}
