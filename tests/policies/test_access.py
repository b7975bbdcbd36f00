import pytest

from policies.access import Access, may_use
from policies.verdict import Denial
from tests.support.builders import a_caller, a_model, an_exchange


def test_a_key_without_a_list_may_use_every_model():
    assert may_use(a_caller(models=None), "anything")


@pytest.mark.parametrize(
    ("allowed", "name", "expected"),
    [
        ({"demo"}, "demo", True),
        ({"demo"}, "demo2", False),
        ({"openai/*"}, "openai/gpt-5", True),
        ({"openai/*"}, "openai", False),
        ({"openai/*"}, "openaix/gpt-5", False),
        (set(), "demo", False),
        ({"*"}, "demo", True),
        ({"de*o"}, "demo", False),
    ],
)
def test_a_list_names_models_or_prefixes(allowed, name, expected):
    assert may_use(a_caller(models=frozenset(allowed)), name) is expected


def test_a_model_outside_the_list_is_refused_alike_whether_or_not_it_exists():
    caller = a_caller(models=frozenset({"mine"}))
    existing = Access().admit(an_exchange(caller=caller, model=a_model("theirs")), 0.0)
    missing = Access().admit(an_exchange(caller=caller, model_name="theirs", model=None), 0.0)
    assert isinstance(existing, Denial)
    assert existing == missing
    assert existing.status == 403


def test_a_name_nobody_serves_is_404_with_the_code_programs_branch_on():
    denial = Access().admit(an_exchange(model_name="nope", model=None), 0.0)
    assert denial is not None
    assert (denial.status, denial.code, denial.param) == (404, "model_not_found", "model")


def test_an_allowed_model_is_admitted():
    assert Access().admit(an_exchange(model=a_model("demo")), 0.0) is None
