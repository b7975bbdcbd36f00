import pytest

from backends.origin import Origin
from backends.transport import ConnectionPool


def test_a_base_url_becomes_an_origin_and_a_path_without_a_trailing_slash():
    origin, path = Origin.parse("https://API.example.com/v1/")
    assert (origin.scheme, origin.host, origin.port, path) == ("https", "api.example.com", 443, "/v1")
    assert Origin.parse("http://localhost:8000")[1] == ""


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("https://a.example", "a.example"),
        ("https://a.example:443", "a.example"),
        ("https://a.example:80", "a.example:80"),
        ("http://127.0.0.1:8000", "127.0.0.1:8000"),
        ("http://[::1]:8000/v1", "[::1]:8000"),
        ("http://[::1]", "[::1]"),
    ],
)
def test_the_host_header_has_a_port_only_where_it_is_not_the_schemes_own(url, authority):
    assert Origin.parse(url)[0].authority == authority


def test_origins_are_equal_by_value_and_can_be_keys():
    assert Origin.parse("http://a:1/x")[0] == Origin.parse("http://a:1/y")[0]
    different = [
        Origin.parse("http://a:1")[0],
        Origin.parse("https://a:1")[0],
        Origin.parse("http://a:2")[0],
        Origin.parse("http://a:1", proxy="http://p")[0],
        Origin.parse("http://a:1", verify=False)[0],
    ]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com/v1",
        "ftp://a.example",
        "https://",
        "https:///v1",
        "https://a.example:0",
        "https://a.example:99999",
        "https://a.example:abc",
        "https://a.example/v1?x=1",
        "https://a.example/v1#x",
        "https://key:secret@a.example",
        "https://a.example/v 1",
        "https://a.example/\r\nx: y",
        "https://a.exa\tmple",
        "https://bücher.example",
        "https://a..example",
        "https://-a.example",
        "https://a_b!.example",
        "https://[::1",
        "https://[::g]",
        "https://[fe80::1%25eth0]",
    ],
)
def test_an_unusable_base_url_is_refused_with_a_sentence_that_does_not_repeat_it(url):
    with pytest.raises(ValueError) as caught:
        Origin.parse(url)
    message = str(caught.value)
    assert message.startswith("the base URL ")
    assert "secret" not in message


@pytest.mark.parametrize(
    "proxy",
    [
        "https://p:1",
        "socks5://p:1",
        "p:8080",
        "http://p/path",
        "http://u:secret@p:1/?x",
        "http://u:secret@p:77777",
    ],
)
def test_an_unusable_proxy_is_refused_without_showing_its_password(proxy):
    with pytest.raises(ValueError, match="the proxy's URL") as caught:
        Origin.parse("http://a", proxy=proxy)
    assert "secret" not in str(caught.value)


async def test_no_repr_shows_the_proxys_password():
    origin, _ = Origin.parse("http://a", proxy="http://user:s3cr%40t@proxy.example:3128")
    assert origin.proxy.authorization == "Basic dXNlcjpzM2NyQHQ="
    for shown in (
        repr(origin),
        str(origin),
        repr(origin.proxy),
        str(origin.proxy),
        repr(ConnectionPool(origin)),
    ):
        assert "s3cr" not in shown
        assert "dXNl" not in shown
    assert "proxy.example" in repr(origin)


def test_a_ca_file_that_cannot_be_used_is_found_when_the_configuration_is_read(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        Origin.parse("https://a", ca_file=str(tmp_path / "missing.pem"))
    (tmp_path / "empty.pem").write_text("not a certificate")
    with pytest.raises(ValueError, match="holds no certificate"):
        Origin.parse("https://a", ca_file=str(tmp_path / "empty.pem"))


def test_contexts_are_shared_by_origins_with_the_same_settings():
    a, b = Origin.parse("https://a")[0], Origin.parse("https://b")[0]
    assert a.tls_context() is b.tls_context()
    assert a.tls_context() is not Origin.parse("https://a", verify=False)[0].tls_context()
    assert Origin.parse("http://a")[0].tls_context() is None
