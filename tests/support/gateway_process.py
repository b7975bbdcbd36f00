"""The real gateway as a child process: `python -m gateway serve` with a configuration of the test's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Self

import apsw
import yaml

ROOT = Path(__file__).parents[2]
# The interpreter of an installed build that is to be tested instead of the checkout (`make test-compiled`).
INSTALLED_PYTHON = os.environ.get("HEADGATE_TEST_PYTHON", "")
KEY = "sk-test-6f1c2a9b8d7e4f30"  # declared in the configuration of every test gateway
OPERATOR_KEY = "op-test-51c07d3e9a6b42f8"


_held: list[socket.socket] = []


def free_port() -> int:
    """Ours for as long as this process lives: the kernel gives it to nobody else, and whoever names it may listen there."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return holder.getsockname()[1]


class Gateway:
    """Started by `with`; the log goes to a file, shown when it does not start.

    `module` is what is run instead of the product itself (a broken build), `environ` is added to the environment.
    """

    def __init__(
        self,
        directory: Path,
        *,
        workers: int = 1,
        module: str = "gateway",
        environ: dict[str, str] | None = None,
        **config: Any,
    ) -> None:
        self.module, self.environ = module, environ or {}
        self.directory = directory
        self.port, self.management_port = free_port(), free_port()
        self.config_path = directory / "config.yaml"
        self.log_path = directory / "gateway.log"
        self.config = {
            "server": {"port": self.port, "workers": workers, **config.pop("server", {})},
            "management": {
                "port": self.management_port,
                "open_metrics": True,
                "keys": [{"name": "test-operator", "key": OPERATOR_KEY}],
            },
            "storage": {"directory": str(directory / "data")},
            "keys": [{"name": "test", "key": KEY, "team": "tests"}, *config.pop("keys", [])],
            **config,
        }
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def write_config(self) -> None:
        self.config_path.write_text(yaml.safe_dump(self.config, sort_keys=False))

    def start(self, ready_s: float = 180.0) -> None:
        self.write_config()
        environment = {k: v for k, v in os.environ.items() if not k.endswith(("_API_KEY", "_BASE_URL"))}
        python = [sys.executable]
        if INSTALLED_PYTHON and self.module == "gateway":  # broken builds are made of the checkout
            python = [INSTALLED_PYTHON, "-P"]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*python, "-m", self.module, "serve", "--config", str(self.config_path)],
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment | self.environ,
            )
        deadline = time.monotonic() + ready_s
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        self.kill()
        raise AssertionError(f"the gateway did not start:\n{self.log()[-4000:]}")

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_log(self, text: str, within_s: float = 30.0) -> str:
        """The log, once it holds `text`: lines are written a moment late."""
        deadline = time.monotonic() + within_s
        while text not in (log := self.log()):
            assert time.monotonic() < deadline, f"not in the log: {text!r}"
            time.sleep(0.02)
        return log

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM and wait. The exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return self.process.returncode

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def rows(self, expected: int = 0, within_s: float = 30.0) -> list[dict[str, Any]]:
        """The ledger, oldest first; waits until there are as many rows as expected."""
        return self._rows("ORDER BY received_time_us, request_id", (), expected, within_s)

    def row(self, request_id: str, within_s: float = 30.0) -> dict[str, Any]:
        """The row of one request; waits until it is written."""
        rows = self._rows("WHERE request_id = ?", (request_id,), 1, within_s)
        assert len(rows) == 1, f"{len(rows)} rows for {request_id}"
        return rows[0]

    def _rows(
        self, clause: str, bindings: tuple[str, ...], expected: int, within_s: float
    ) -> list[dict[str, Any]]:
        deadline = time.monotonic() + within_s
        path = str(self.directory / "data/headgate.db")
        connection = apsw.Connection(path, flags=apsw.SQLITE_OPEN_READONLY)
        try:
            while True:
                cursor = connection.execute(f"SELECT * FROM ledger {clause}", bindings)
                rows = [
                    dict(zip((column[0] for column in cursor.get_description()), row, strict=True))
                    for row in cursor
                ]
                if len(rows) >= expected or time.monotonic() > deadline:
                    return rows
                time.sleep(0.02)
        finally:
            connection.close()

    def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One plain request: (status, headers, body)."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"authorization": f"Bearer {KEY}", "content-type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, data, sent)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, dict(answer.headers), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), error.read()

    def manage(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """The management plane's JSON answer, asked for with the operator key."""
        url = f"http://127.0.0.1:{self.management_port}{path}"
        headers = {"authorization": f"Bearer {OPERATOR_KEY}"}
        with urllib.request.urlopen(
            urllib.request.Request(
                url, None if body is None else json.dumps(body).encode(), headers, method=method
            ),
            timeout=30,
        ) as answer:
            return json.loads(answer.read())

    def metrics(self) -> dict[str, float]:
        """Every sample of the metrics page by its name with labels, as `headgate_connections`."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.management_port}/metrics", timeout=30) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()
