"""The sockets the service listens on: bound before anything is started, or a sentence on what to change.

Knows addresses and ports, not what is served on them.
"""

import errno
import socket
from typing import Final

from gateway.config import ManagementConfig, ServerConfig

BACKLOG: Final = 4096


class ListenError(Exception):
    """The address cannot be listened on; the message says what to change."""


def bound(section: str, settings: ServerConfig | ManagementConfig, port: int | None) -> socket.socket:
    """A listening socket, or ListenError with what to change."""
    host = settings.host
    port = settings.port if port is None else port
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
            listener.setblocking(False)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            advice = f"the port is in use: stop what listens there, or choose another {section}.port"
        elif error.errno == errno.EACCES:
            advice = f"no permission for a port below 1024: choose another {section}.port"
        elif error.errno == errno.EADDRNOTAVAIL:
            advice = f"this machine does not have the address: change {section}.host"
        else:
            advice = error.strerror or str(error)
        raise ListenError(f"Cannot listen on {host} port {port}: {advice}.") from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if host in {"0.0.0.0", "::"}:  # noqa: S104 - what to paste, not what to bind
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
