from policies.cost_guard import CostGuard
from tests.support.builders import a_model, an_exchange, an_unknown_price


def test_a_model_without_a_price_is_refused_with_what_to_change():
    denial = CostGuard().admit(an_exchange(model=a_model(price=an_unknown_price())), 0.0)
    assert denial is not None
    assert denial.code == "price_unknown"
    assert "prices.overrides" in denial.message


def test_a_priced_model_is_admitted():
    assert CostGuard().admit(an_exchange(model=a_model()), 0.0) is None
