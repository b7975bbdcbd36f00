import sys
from importlib import metadata

import aiohttp
from aiohttp import http_parser

from gateway import floors
from gateway.stores.sqlite import check_version


def test_what_is_installed_is_good_enough():
    assert floors.problems() == []


def test_each_old_version_is_named_with_what_is_needed(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9, "final", 0))
    monkeypatch.setattr(aiohttp, "__version__", "3.14.4")
    monkeypatch.setattr(metadata, "version", lambda name: "0.22.1")
    monkeypatch.setattr(floors, "check_version", lambda: check_version("3.51.2"))
    python, aio, uv, sqlite = floors.problems()
    assert "Python 3.10.9" in python
    assert "3.11" in python
    assert "aiohttp 3.14.4" in aio
    assert "3.14.5" in aio
    assert "uvloop 0.22.1" in uv
    assert "SQLite 3.51.2" in sqlite


def test_later_versions_compare_by_number_not_by_letter(monkeypatch):
    monkeypatch.setattr(aiohttp, "__version__", "3.100.0")
    monkeypatch.setattr(metadata, "version", lambda name: "1.0.0rc1")
    assert floors.problems() == []


def test_a_missing_c_parser_is_refused(monkeypatch):
    monkeypatch.setattr(http_parser, "HttpRequestParser", http_parser.HttpRequestParserPy)
    (problem,) = floors.problems()
    assert "C parser" in problem
