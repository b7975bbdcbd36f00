"""Where an upstream is: scheme, host, port, the proxy on the way and what its certificate is checked against.

Owns the reading of configured URLs and the TLS contexts. Refuses to know connections. Invariants: an Origin is
equal by value, safe to put into a request head, and shows no secret of its proxy.
"""

import base64
import functools
import ipaddress
import re
import ssl
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, unquote_to_bytes, urlsplit

_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_HOST_NAME: Final = re.compile(r"(?!-)[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*\.?")
_PRINTABLE: Final = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Proxy:
    """An HTTP proxy. `authorization` is the value of its Proxy-Authorization header, "" for none."""

    host: str
    port: int
    authorization: str = field(default="", repr=False)

    @classmethod
    def parse(cls, url: str) -> "Proxy":
        parts = _split(url, "the proxy's URL")
        if parts.scheme != "http":
            raise ValueError(
                "the proxy's URL must start with http:// (TLS to the proxy and SOCKS are not supported)"
            )
        if parts.path not in {"", "/"} or parts.query or parts.fragment:
            raise ValueError("the proxy's URL must end after the port")
        authorization = ""
        if parts.username is not None:
            secret = unquote_to_bytes(parts.username) + b":" + unquote_to_bytes(parts.password or "")
            authorization = "Basic " + base64.b64encode(secret).decode()
        host, port = _host_and_port(parts, "the proxy's URL")
        return cls(host, port, authorization)

    def __str__(self) -> str:
        return f"proxy {_bracketed(self.host)}:{self.port}"


@dataclass(frozen=True, slots=True)
class Origin:
    """One upstream server. `host` carries no brackets; `ca_file` is trusted besides the system's CAs."""

    scheme: str
    host: str
    port: int
    proxy: Proxy | None = None
    ca_file: str | None = None
    verify: bool = True

    @classmethod
    def parse(
        cls, url: str, *, proxy: str | None = None, ca_file: str | None = None, verify: bool = True
    ) -> tuple["Origin", str]:
        """The origin of a base URL, and the URL's path without a trailing slash.

        ValueError with a sentence if a URL or the CA file is unusable; it never repeats a URL, which may hold a
        secret.
        """
        parts = _split(url, "the base URL")
        if parts.username is not None:
            raise ValueError(
                "the base URL must not hold a user name or password; configure the API key instead"
            )
        if parts.query or parts.fragment:
            raise ValueError("the base URL must not hold a query (?) or a fragment (#)")
        host, port = _host_and_port(parts, "the base URL")
        origin = cls(parts.scheme, host, port, Proxy.parse(proxy) if proxy else None, ca_file, verify)
        origin.tls_context()  # a CA file that cannot be read is found now, not at the first request
        return origin, parts.path.rstrip("/")

    @property
    def authority(self) -> str:
        """The value of the Host header: the port only where it is not the scheme's own."""
        host = _bracketed(self.host)
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """None for plain http. Origins with the same settings share one context."""
        return _tls_context(self.ca_file, verify=self.verify) if self.scheme == "https" else None

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}"


def _split(url: str, what: str) -> SplitResult:
    # urlsplit drops tabs and line ends in silence, so they are refused before it sees them.
    if not _PRINTABLE.fullmatch(url):
        raise ValueError(
            f"{what} must be printable ASCII without spaces (an international host in its xn-- form)"
        )
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(f"{what} has a malformed host") from None
    if parts.scheme not in _DEFAULT_PORTS or not parts.hostname:
        raise ValueError(f"{what} must look like https://host[:port][/path]")
    return parts


def _host_and_port(parts: SplitResult, what: str) -> tuple[str, int]:
    host = parts.hostname or ""
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"{what} has a port that is not a number from 1 to 65535")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host if "%" not in host else "")
        except ValueError:
            raise ValueError(f"{what} has a malformed IPv6 address as its host") from None
    elif not _HOST_NAME.fullmatch(host):
        raise ValueError(f"{what} has a host with characters no host name has")
    return host, port or _DEFAULT_PORTS[parts.scheme]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


@functools.cache
def _tls_context(ca_file: str | None, *, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if ca_file is not None:
        try:
            context.load_verify_locations(cafile=ca_file)
        except ssl.SSLError:
            raise ValueError(f"the CA file {ca_file} holds no certificate in PEM form") from None
        except OSError as error:
            raise ValueError(f"the CA file {ca_file} cannot be read: {error.strerror}") from None
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
