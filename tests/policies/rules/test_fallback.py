import pytest

from backends.dialect import CHAT, RESPONSES
from backends.errors import UpstreamError
from policies.routing import Model
from policies.rules.fallback import (
    CLASSES,
    Fallback,
    ModelRouting,
    class_of,
    fall_back,
    has_fallbacks,
    next_fallback,
)
from policies.rules.split import Split
from tests.support.builders import a_caller, a_model, an_exchange


def a_chain(**edges: list[tuple[str, str]]) -> dict[str, Model]:
    """Models by name; `a=[("b", "error timeout")]` makes b a fallback of a."""
    names = dict.fromkeys([*edges, *(to for fallbacks in edges.values() for to, _ in fallbacks)])
    models = {name: a_model(name) for name in names}
    for name, fallbacks in edges.items():
        models[name].routing = ModelRouting(
            fallbacks=tuple(Fallback(models[to], frozenset(on.split())) for to, on in fallbacks)
        )
    return models


def walk(exchange, *failures: str) -> list[str]:
    """The models that follow, as long as there are any."""
    visited = []
    for failure in failures:
        if not fall_back(exchange, failure):
            break
        visited.append(exchange.model.name)
    return visited


async def test_a_failure_goes_to_the_first_fallback_that_is_for_it():
    models = a_chain(a=[("b", "context"), ("c", "error timeout"), ("d", "error")])
    assert walk(an_exchange(model=models["a"]), "error") == ["c"]
    assert walk(an_exchange(model=models["a"]), "context") == ["b"]
    assert walk(an_exchange(model=models["a"]), "budget") == []


async def test_a_chain_goes_on_with_the_fallbacks_of_the_model_it_fell_to():
    models = a_chain(a=[("b", "error"), ("d", "error")], b=[("c", "error")])
    assert walk(an_exchange(model=models["a"]), *["error"] * 9) == ["b", "c", "d"]


async def test_fallbacks_of_a_model_that_was_not_tried_are_not_taken():
    models = a_chain(a=[("b", "context"), ("d", "error")], b=[("c", "error")])
    assert walk(an_exchange(model=models["a"]), *["error"] * 9) == ["d"]


async def test_no_model_is_tried_twice():
    models = a_chain(a=[("b", "error"), ("c", "error")], b=[("c", "error")])
    assert walk(an_exchange(model=models["a"]), *["error"] * 9) == ["b", "c"]


async def test_a_caller_never_falls_to_a_model_that_its_key_may_not_use():
    models = a_chain(a=[("b", "error"), ("c", "error")])
    exchange = an_exchange(model=models["a"], caller=a_caller(models=frozenset({"a", "c"})))
    assert walk(exchange, "error") == ["c"]


async def test_a_fallback_that_grants_is_for_every_caller():
    models = a_chain(a=[])
    models["a"].routing = ModelRouting(fallbacks=(Fallback(a_model("b"), frozenset({"error"}), grants=True),))
    exchange = an_exchange(model=models["a"], caller=a_caller(models=frozenset({"a"})))
    assert walk(exchange, "error") == ["b"]


async def test_a_request_that_continues_an_answer_stays_with_the_model_that_made_it():
    models = a_chain(a=[("b", "error")])
    assert walk(an_exchange(model=models["a"], continues="resp_1"), "error") == []


async def test_a_model_that_does_not_speak_the_dialect_is_passed_over():
    models = a_chain(a=[("b", "error")])
    assert next_fallback(an_exchange(RESPONSES, model=models["a"]), "error") is None
    assert next_fallback(an_exchange(CHAT, model=models["a"]), "error").model is models["b"]


async def test_what_a_fallback_shares_out_is_shared_out_anew():
    models = a_chain(a=[("b", "error")])
    targets = models["b"].targets
    models["b"].routing = ModelRouting(split=Split(targets, [1.0], "session"))
    exchange = an_exchange(model=models["a"], targets=models["a"].targets)
    assert fall_back(exchange, "error")
    assert exchange.targets == targets
    assert exchange.fallen_from == (models["a"],)


async def test_only_a_model_with_fallbacks_has_any():
    models = a_chain(a=[("b", "error")])
    assert has_fallbacks(an_exchange(model=models["a"]))
    assert not has_fallbacks(an_exchange(model=models["b"]))
    assert not has_fallbacks(an_exchange())


@pytest.mark.parametrize(
    ("failure", "class_"),
    [
        (UpstreamError("connect", ""), "error"),
        (UpstreamError("unusable", ""), "error"),
        (UpstreamError("first_byte_timeout", ""), "timeout"),
        (429, "rate_limit"),
        (503, "overload"),
        (529, "overload"),
        (504, "timeout"),
        (500, "error"),
        (502, "error"),
        (401, "error"),
        (404, "error"),
        (400, None),
        (422, None),
        (200, None),
    ],
)
def test_failures_are_of_a_class(failure, class_):
    assert class_of(failure) == class_
    assert class_ is None or class_ in CLASSES
