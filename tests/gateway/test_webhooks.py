"""Webhooks: signed as the standard has it, and sent nowhere they should not go."""

import asyncio
import contextlib
import ipaddress
import socket

import pytest
from aiohttp import web

from gateway.webhook_sender import Outcome, Sender
from gateway.webhooks import (
    ANYWHERE,
    Networks,
    Reach,
    check_url,
    is_public,
    read_secret,
    signature,
)

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"


def test_the_signature_is_that_of_the_standards_own_example():
    signed = signature(
        [read_secret(SECRET)], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_while_one_secret_replaces_another_both_sign():
    other = "whsec_" + "QUJD" * 8
    both = signature([read_secret(SECRET), read_secret(other)], "msg", 1, b"{}")
    assert both.split() == [signature([read_secret(one)], "msg", 1, b"{}") for one in (SECRET, other)]


@pytest.mark.parametrize(
    "secret", ["", "secret", "whsec_", "whsec_QUJD", "whsec_" + "QUJD" * 30, "whsec_é" * 9]
)
def test_what_is_no_secret_is_refused_without_repeating_it(secret):
    with pytest.raises(ValueError, match="24 to 64 random bytes") as refused:
        read_secret(secret)
    assert len(secret) < 9 or secret not in str(refused.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "192.168.0.1",
        "172.16.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "::7f00:1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::",
        "2002:a9fe:a9fe::1",
        "2001:0:4136:e378:8000:63bf:f5ff:fffe",  # Teredo, of 10.0.0.1
    ],
)
def test_private_addresses_are_not_public_however_they_are_wrapped(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses_are(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://acme.example/",
        "ftp://acme.example/",
        "https://",
        "https://user@acme.example/",
        "https://acme.example:8443/",
        "https://localhost/",
        "https://a.localhost/",
        "https://metadata.google.internal/",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://[::ffff:169.254.169.254]/",
        "https://acme.example/#x",
        "https://[bad/",
    ],
)
def test_a_url_that_leads_inside_is_refused(url):
    with pytest.raises(ValueError):
        check_url(url)


def test_a_private_receiver_must_be_allowed():
    check_url("https://hooks.acme.example/x?y")
    check_url("http://10.0.0.5:8080/hook", ANYWHERE)


OFFICE = (ipaddress.ip_network("10.0.5.0/24"), ipaddress.ip_network("fd00:1::/64"))


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.acme.example/",
        "http://10.0.5.7:8080/",
        "https://[fd00:1::9]/",
        "http://hooks.lan/",
        "https://1.1.1.1/",
    ],
)
def test_an_allowed_network_may_be_written_to(url):
    check_url(url, OFFICE)


@pytest.mark.parametrize(
    "url", ["http://10.0.6.7/", "https://169.254.169.254/", "http://1.1.1.1/", "https://[::ffff:10.0.6.1]/"]
)
def test_beside_the_allowed_networks_the_rule_is_as_without(url):
    with pytest.raises(ValueError, match="in a network that is allowed"):
        check_url(url, OFFICE)


def test_a_network_is_allowed_however_its_addresses_are_wrapped():
    assert Reach(OFFICE, may_be_public=False).covers("::ffff:10.0.5.1")
    assert not Reach(OFFICE, may_be_public=False).covers("1.1.1.1")


class Receiver:
    """Answers as it is told; remembers what came."""

    def __init__(self) -> None:
        self.answers = [200]
        self.headers: dict[str, str] = {}
        self.received = []
        self.other = 0
        self.body_bytes = 1000
        self.sent_bytes = 0
        self.is_hanging = False
        self.release = asyncio.Event()
        self.under_way = 0
        self._has_come = asyncio.Condition()

    async def wait_until(self, under_way: int) -> None:
        async with asyncio.timeout(30), self._has_come:
            await self._has_come.wait_for(lambda: self.under_way >= under_way)

    async def hook(self, request: web.Request) -> web.StreamResponse:
        self.received.append((dict(request.headers), await request.read()))
        async with self._has_come:
            self.under_way += 1
            self._has_come.notify_all()
        if self.is_hanging:
            await self.release.wait()
        self.under_way -= 1
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        answer = web.StreamResponse(status=status, headers=self.headers)
        await answer.prepare(request)
        with contextlib.suppress(ConnectionError):
            while self.sent_bytes < self.body_bytes:
                await answer.write(b"x" * 1000)
                self.sent_bytes += 1000
        return answer

    async def elsewhere(self, _: web.Request) -> web.Response:
        self.other += 1
        return web.Response()


@contextlib.asynccontextmanager
async def receiving():
    receiver = Receiver()
    app = web.Application()
    app.router.add_post("/hook", receiver.hook)
    app.router.add_route("*", "/elsewhere", receiver.elsewhere)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener).start()
    receiver.port = listener.getsockname()[1]
    receiver.url = f"http://127.0.0.1:{receiver.port}/hook"
    sender = Sender()
    try:
        yield receiver, sender
    finally:
        await sender.close()
        await runner.cleanup()


async def send(sender: Sender, url: str, allowed: Networks = ANYWHERE) -> Outcome:
    message = ("alert_1", 1_700_000_000, b'{"type":"x"}')
    return await sender.send(url, [read_secret(SECRET)], message, allowed)


async def test_a_receiver_gets_the_body_and_the_three_headers():
    async with receiving() as (receiver, sender):
        assert (await send(sender, receiver.url)).is_delivered
    ((headers, body),) = receiver.received
    assert body == b'{"type":"x"}'
    assert (headers["webhook-id"], headers["webhook-timestamp"]) == ("alert_1", "1700000000")
    assert headers["webhook-signature"] == signature([read_secret(SECRET)], "alert_1", 1_700_000_000, body)


async def test_a_redirect_is_a_failure_and_is_not_followed():
    async with receiving() as (receiver, sender):
        receiver.answers = [302]
        receiver.headers = {"location": f"http://127.0.0.1:{receiver.port}/elsewhere"}
        outcome = await send(sender, receiver.url)
    assert (outcome.is_delivered, outcome.status, receiver.other) == (False, 302, 0)


async def test_a_receiver_that_asks_for_time_gets_it_and_one_that_is_gone_is_left_alone():
    async with receiving() as (receiver, sender):
        receiver.answers, receiver.headers = [503, 410], {"retry-after": "120"}
        assert (await send(sender, receiver.url)).retry_after_s == 120.0
        assert (await send(sender, receiver.url)).is_unwanted


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "[::1]", "localhost", "127.1", "2130706433", "0x7f.1", "0177.0.0.1"]
)
async def test_nothing_reaches_this_machine_unless_it_is_allowed(host):
    async with receiving() as (receiver, sender):
        for scheme in ("http", "https"):
            outcome = await send(sender, f"{scheme}://{host}:{receiver.port}/hook", ())
            assert outcome.status == 0
            assert outcome.error
    assert receiver.received == []


async def test_a_name_that_resolves_to_a_private_address_leads_nowhere(monkeypatch):
    """Also past the check of the URL: what counts is the address that would be connected to."""
    async with receiving() as (receiver, sender):

        async def to_this_machine(*_, **__):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", receiver.port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", to_this_machine)
        outcome = await send(sender, "https://rebound.acme.example/hook", ())
    assert "no public address" in outcome.error
    assert receiver.received == []


async def test_a_name_is_connected_to_only_inside_what_is_allowed(monkeypatch):
    """Without TLS not even a public address is, whatever the name says it is now."""
    this_machine = (ipaddress.ip_network("127.0.0.0/8"),)
    async with receiving() as (receiver, sender):
        addresses = ["127.0.0.1"]

        async def to_these(*_, **__):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, receiver.port)) for each in addresses]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", to_these)
        url = f"http://hooks.lan:{receiver.port}/hook"
        assert (await send(sender, url, this_machine)).is_delivered
        assert "no public address" in (await send(sender, url, OFFICE)).error
        addresses[:] = ["192.0.2.1", "10.9.9.9", "1.1.1.1"]
        assert "no public address" in (await send(sender, url, this_machine)).error
    assert len(receiver.received) == 1


async def test_an_endless_answer_is_not_read_to_its_end():
    async with receiving() as (receiver, sender):
        receiver.body_bytes = 100 * 1024 * 1024
        assert (await send(sender, receiver.url)).is_delivered
        assert receiver.sent_bytes < 20 * 1024 * 1024


async def test_a_receiver_that_is_not_there_is_an_outcome():
    async with receiving() as (_, sender):
        with socket.create_server(("127.0.0.1", 0)) as unheard:
            port = unheard.getsockname()[1]
        outcome = await send(sender, f"http://127.0.0.1:{port}/hook")
    assert (outcome.status, outcome.is_delivered) == (0, False)
    assert outcome.error
