import re

import pytest

from gateway import listener
from gateway.config import ManagementConfig, ServerConfig
from gateway.listener import ListenError


@pytest.mark.parametrize(
    ("number", "advice"),
    [(98, "choose another management.port"), (13, "below 1024"), (99, "change management.host")],
)
def test_why_a_socket_cannot_be_bound_is_told_with_the_setting(monkeypatch, number, advice):
    def refuse(*_: object) -> None:
        raise OSError(number, "refused by the test")

    monkeypatch.setattr(listener.socket.socket, "bind", refuse)
    with pytest.raises(ListenError, match=advice):
        listener.bound("management", ManagementConfig(), None)


def test_a_name_that_does_not_resolve_is_told():
    with pytest.raises(ListenError, match=r"Cannot listen on no\.such\.host\.invalid port 8080"):
        listener.bound("server", ServerConfig(host="no.such.host.invalid"), None)


def test_an_ipv6_address_is_bound_and_shown_with_brackets():
    try:
        found = listener.bound("server", ServerConfig(host="::1", port=0), None)
    except ListenError:
        pytest.skip("no IPv6 here")
    with found:
        assert re.fullmatch(r"http://\[::1\]:\d+", listener.url_of(found))
