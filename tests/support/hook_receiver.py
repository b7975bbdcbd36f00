"""A webhook's receiver on a thread of its own: what came, and what is answered to the next ones."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self


class Hook(NamedTuple):
    """One delivery. Header names are lower case."""

    headers: dict[str, str]
    body: bytes


class HookReceiver:
    """Used by `with`. `status` is what the next deliveries are answered with."""

    def __init__(self) -> None:
        self.status = 200
        self.hooks: list[Hook] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.hooks.append(Hook({k.lower(): v for k, v in self.headers.items()}, body))
                self.send_response(receiver.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/hook-5f1e"
        self._thread = threading.Thread(target=self._server.serve_forever, name="hooks", daemon=True)

    def until(self, is_there: Callable[[list[Hook]], Any], within_s: float = 90.0) -> Any:
        """What `is_there` makes of what has come, once it is something."""
        deadline = time.monotonic() + within_s
        while not (found := is_there(list(self.hooks))):
            assert time.monotonic() < deadline, f"it was not told: {self.hooks!r}"
            time.sleep(0.02)
        return found

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)
