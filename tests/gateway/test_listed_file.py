"""Endpoints in a file: its forms, its mistakes, and that changes are seen."""

import json

import pytest

from backends.discovery.config import DiscoveryConfig
from backends.discovery.found import DiscoveryError, Found
from gateway.listed_file import FileFinder, entries

SETTINGS = DiscoveryConfig.model_validate({"file": {"path": "engines"}, "every_s": 0.05, "role": "decode"})
A, B = "http://10.0.0.1:8000/v1", "http://10.0.0.2:8000/v1"


@pytest.mark.parametrize(
    "content",
    [
        f"# engines\n{A}\n\n  {B}/ \n",
        f"- {A}\n- {B}\n",
        json.dumps([A, B]),
        json.dumps({"endpoints": [{"url": A}, {"url": B}]}),
        f"endpoints:\n  - url: {A}\n  - url: {B}\n",
    ],
)
def test_a_list_may_be_text_yaml_or_json(content):
    assert entries(content.encode(), SETTINGS) == (Found(A, A, "decode"), Found(B, B, "decode"))


def test_an_entry_may_say_what_is_known_of_it():
    content = json.dumps(
        [{"url": A, "name": "big-1", "role": "prefill", "weight": 2, "ranks": 4, "is_open": False}]
    )
    assert entries(content.encode(), SETTINGS) == (
        Found("big-1", A, "prefill", 2.0, 4, is_open=False, name="big-1"),
    )


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\xff\xfe", "neither a list of URLs nor YAML nor JSON"),
        (b"{", "neither"),
        (b"- {url: http://a, wait: 3}", "at 0.*wait"),
        (b"- ftp://a/v1", "entry 1 of the file"),
        (b"- http://a/v1\n- http://a/v1", "twice"),
        (b"just some words", "its top"),
        (b"- {url: 'http://a', weight: 0}", "weight"),
    ],
)
def test_a_mistake_is_named(content, problem):
    with pytest.raises(DiscoveryError, match=problem):
        entries(content, SETTINGS)


def test_an_empty_file_has_no_endpoints():
    assert entries(b"\n# nobody\n", SETTINGS) == ()


async def test_a_change_is_seen_and_a_file_that_is_gone_is_an_error(tmp_path):
    path = tmp_path / "engines"
    path.write_text(A)
    settings = DiscoveryConfig.model_validate({"file": {"path": str(path)}, "every_s": 0.05})
    follow = FileFinder(settings, settings.file).follow()
    assert [each.url for each in await anext(follow)] == [A]
    path.write_text(f"{A}\n{B}\n")
    assert [each.url for each in await anext(follow)] == [A, B]
    path.unlink()
    with pytest.raises(DiscoveryError, match="cannot be read"):
        await anext(follow)
