"""What can go wrong between us and an upstream.

An `UpstreamError` is raised when there is no usable answer; an answer with an error status is an answer.
Knows nothing of how it is told to a client (`gateway.errors` maps it).
"""

from typing import Final, Literal

ErrorKind = Literal[
    "connect",  # no connection: refused, unreachable, name not resolved
    "tls",  # handshake or certificate refused
    "proxy",  # the outgoing proxy refused the tunnel
    "reset",  # the connection died before the head of the answer was whole
    "protocol",  # the answer is not valid HTTP/1.1, or breaks a limit of ours
    "too_large",  # head or body beyond the configured limit
    "incomplete",  # the connection died inside the body
    "unusable",  # a whole answer, but none to what was asked: a redirect, a page, a coding nobody asked for
    "connect_timeout",
    "first_byte_timeout",
    "idle_timeout",
    "total_timeout",
]

TIMEOUTS: Final[frozenset[str]] = frozenset(
    {"connect_timeout", "first_byte_timeout", "idle_timeout", "total_timeout"}
)
# Nothing was sent, so sending it elsewhere cannot do the work twice.
NOTHING_SENT: Final[frozenset[str]] = frozenset({"connect", "tls", "proxy", "connect_timeout"})

# Statuses that say: too much to do, not broken. A 503 says so only if the API itself speaks, not a proxy before it.
LOAD_STATUSES: Final = frozenset({429, 503, 529})


class UpstreamError(Exception):
    """No usable answer.

    `sent` is False while no byte of the request can have reached the upstream. `stale` is True when a kept
    connection died before the first byte of an answer: the upstream closed it while idle, and the request is
    safe to repeat on a fresh one (RFC 9112 section 9.3.1 allows this only with such knowledge).
    """

    def __init__(self, kind: ErrorKind, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.kind: ErrorKind = kind
        self.message = message
        self.stale = stale
        self.sent = kind not in NOTHING_SENT
