"""Who a request says it is for."""

import msgspec
import pytest

from gateway.end_user import EndUsers
from gateway.http_rules import Refusal
from gateway.limits_config import EndUsersConfig
from policies.exchange import Caller

CALLER = Caller("k1", "app-1", "research", organisation="acme")


def said(
    document: dict, headers: dict[bytes, bytes] | None = None, caller: Caller = CALLER, **settings
) -> str:
    settings = {"fields": ["safety_identifier", "user", "metadata.user_id"], **settings}
    values = msgspec.json.decode(msgspec.json.encode(document), type=dict[str, msgspec.Raw])
    return EndUsers(EndUsersConfig(**settings)).read(caller, headers or {}, values)


@pytest.mark.parametrize(
    ("document", "user"),
    [
        ({"user": "ada"}, "ada"),
        ({"safety_identifier": "s1", "user": "ada"}, "s1"),
        ({"metadata": {"user_id": "bob", "more": [1]}}, "bob"),
        ({"user": 7, "metadata": {"user_id": "bob"}}, "bob"),
        ({"user": None, "metadata": None}, ""),
        ({"metadata": "odd"}, ""),
        ({}, ""),
    ],
)
def test_the_first_field_that_says_it_counts(document, user):
    assert said(document) == (f"acme/{user}" if user else "")


def test_a_header_comes_before_the_fields():
    assert said({"user": "ada"}, {b"x-user": b"eve"}, header="x-user") == "acme/eve"
    assert said({"user": "ada"}, {}, header="x-user") == "acme/ada"


def test_the_same_id_is_another_person_in_another_tenant():
    assert said({"user": "ada"}, caller=Caller("k1", "a", "research")) == "research/ada"
    assert said({"user": "ada"}, caller=Caller("k1", "a")) == "k1/ada"


def test_only_trusted_keys_are_believed():
    assert said({"user": "ada"}, keys=["app-*"]) == "acme/ada"
    assert said({"user": "ada"}, keys=["web"]) == ""
    assert said({}, keys=["web"], required=True) == ""


def test_who_must_say_it_is_told_where():
    with pytest.raises(Refusal, match="x-user or user") as refused:
        said({}, fields=["user"], header="x-user", required=True)
    assert refused.value.code == "end_user_missing"


@pytest.mark.parametrize("user", ["a" * 257, "a\nb"])
def test_an_odd_id_is_refused(user):
    with pytest.raises(Refusal):
        said({"user": user})
