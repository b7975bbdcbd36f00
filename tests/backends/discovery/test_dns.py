"""Endpoints by name: the bytes of DNS against a real socket, and what its answers mean against an injected resolver."""

import contextlib

import pytest

from backends.discovery.config import DiscoveryConfig
from backends.discovery.dns import DnsFinder, ServerResolver
from backends.discovery.dns_query import Service, query, server_address, system_server
from backends.discovery.found import DiscoveryError
from tests.support.name_server import NameServer


@pytest.fixture
def server():
    with NameServer() as running:
        yield running


async def test_addresses_of_both_families_are_read_behind_an_alias(server):
    server.records = {
        ("engines.test", "A"): ["10.0.0.1", "10.0.0.2"],
        ("engines.test", "AAAA"): ["fd00::1"],
        ("engines.test", "CNAME"): ["other.test"],
    }
    assert await query("engines.test.", "A", server.address) == ["10.0.0.1", "10.0.0.2"]
    assert await ServerResolver(server.address).addresses("engines.test") == [
        *("10.0.0.1", "10.0.0.2", "fd00::1"),
    ]


async def test_services_are_read(server):
    server.records = {("_http._tcp.test", "SRV"): [(0, 5, 8000, "a.test"), (1, 0, 8001, "b.test")]}
    assert await query("_http._tcp.test", "SRV", server.address) == [
        Service(0, 5, 8000, "a.test"),
        Service(1, 0, 8001, "b.test"),
    ]


async def test_an_answer_that_is_too_long_for_udp_is_asked_for_again_over_tcp(server):
    many = [f"10.0.{n // 250}.{n % 250 + 1}" for n in range(300)]
    server.records, server.is_cut = {("many.test", "A"): many}, True
    assert await query("many.test", "A", server.address) == many


async def test_a_name_that_does_not_exist_has_no_records_and_a_server_that_fails_is_an_error(server):
    assert await query("nobody.test", "A", server.address) == []
    server.code = 2
    with pytest.raises(DiscoveryError, match="code 2"):
        await query("nobody.test", "A", server.address)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xc0",
        b"\xc0\xff",
        b"\xc0\x0c\x00\x21\x00\x01\x00\x00\x00\x05\xff\xff",
        b"\x3fshort",
        b"\xc0\x0c" + b"\x00\x01\x00\x01\x00\x00\x00\x05\x00\x03abc",
        # A service whose host's name points ahead.
        b"\xc0\x0c" + b"\x00\x21\x00\x01\x00\x00\x00\x05\x00\x08" + b"\x00\x00\x00\x00\x00\x01\xc0\xf0",
    ],
)
@pytest.mark.parametrize("kind", ["A", "SRV"])
async def test_an_answer_that_lies_is_an_error_and_nothing_else(server, raw, kind):
    server.raw, server.records = raw, {("x.test", kind): []}
    with contextlib.suppress(DiscoveryError):
        assert await query("x.test", kind, server.address) == []


def test_name_servers_are_written_as_people_write_them(tmp_path):
    assert server_address("10.0.0.2") == ("10.0.0.2", 53)
    assert server_address("127.0.0.1:5353") == ("127.0.0.1", 5353)
    assert server_address("[::1]:5353") == ("::1", 5353)
    assert server_address("[::1]") == ("::1", 53)
    (tmp_path / "resolv.conf").write_text("# one\nsearch a b\nnameserver 10.9.8.7\nnameserver 1.1.1.1\n")
    assert system_server(tmp_path / "resolv.conf") == ("10.9.8.7", 53)
    with pytest.raises(DiscoveryError, match="give `nameserver`"):
        system_server(tmp_path / "nothing")


class FakeResolver:
    """Says what it was given, one round after the other; an error is raised."""

    def __init__(self, *rounds):
        self.rounds = list(rounds)

    async def addresses(self, name):
        return self.next()

    async def services(self, name):
        return self.next()

    def next(self):
        value = self.rounds.pop(0)
        if isinstance(value, Exception):
            raise value
        return value


def settings(**dns):
    return DiscoveryConfig.model_validate({"dns": {"name": "engines.test", **dns}, "every_s": 0.05})


async def found(config, resolver, rounds):
    finder = DnsFinder(config, config.dns, resolver)
    follow = finder.follow()
    return [[(one.key, one.url, one.weight) for one in await anext(follow)] for _ in range(rounds)]


async def test_each_address_is_an_endpoint_once():
    resolver = FakeResolver(["10.0.0.2", "10.0.0.1", "10.0.0.1"], ["fd00::1"])
    assert await found(settings(port=8000), resolver, 2) == [
        [
            ("10.0.0.1:8000", "http://10.0.0.1:8000/v1", 1.0),
            ("10.0.0.2:8000", "http://10.0.0.2:8000/v1", 1.0),
        ],
        [("fd00::1:8000", "http://[fd00::1]:8000/v1", 1.0)],
    ]


async def test_services_of_the_first_priority_are_endpoints_with_their_weights():
    resolver = FakeResolver(
        [Service(1, 5, 8000, "a.test"), Service(1, 0, 8001, "b.test"), Service(2, 1, 9, "c.test")]
    )
    assert await found(settings(records="srv"), resolver, 1) == [
        [
            ("a.test:8000", "http://a.test:8000/v1", 5.0),
            ("b.test:8001", "http://b.test:8001/v1", 1.0),
        ]
    ]


async def test_an_empty_answer_after_others_is_believed_the_third_time():
    resolver = FakeResolver(["10.0.0.1"], [], [], ["10.0.0.1"], [], [], [])
    assert [len(each) for each in await found(settings(port=1), resolver, 3)] == [1, 1, 0]


async def test_an_empty_first_answer_is_one():
    assert await found(settings(port=1), FakeResolver([]), 1) == [[]]


@pytest.mark.parametrize(
    ("dns", "problem"),
    [
        ({"name": "engines.test"}, "port: is needed"),
        ({"name": "engines.test", "records": "srv", "port": 1}, "port: is needed with address"),
        ({"name": "no blanks", "port": 1}, "must be a host name"),
        ({"name": "a.test", "port": 1, "nameserver": "dns.test"}, "must be an address"),
    ],
)
def test_what_cannot_be_asked_is_refused(dns, problem):
    with pytest.raises(ValueError, match=problem):
        DiscoveryConfig.model_validate({"dns": dns})


def test_there_is_one_source():
    with pytest.raises(ValueError, match="needs one of dns, file and kubernetes"):
        DiscoveryConfig.model_validate({"dns": {"name": "a", "port": 1}, "file": {"path": "x"}})
