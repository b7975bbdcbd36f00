"""A Redis (or Valkey) of the test's own: a free port, a directory, and every way to take it away."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import redis

from tests.support.gateway_process import free_port

PROGRAM = shutil.which(os.environ.get("HEADGATE_TEST_REDIS", "redis-server")) or shutil.which("valkey-server")


class RedisServer:
    """Started by `with`. `options` are the server's own, underscores for hyphens.

    Without `appendonly="yes"` a restart begins empty, as after the loss of the machine.
    """

    def __init__(self, directory: Path, *, is_tls: bool = False, **options: str) -> None:
        self.directory = directory
        self.port, self._is_tls, self._plain_port = _port(), is_tls, _port() if is_tls else 0
        self._options = {
            "bind": "127.0.0.1",
            **(
                {"port": str(self._plain_port), "tls-port": str(self.port)}
                if is_tls
                else {"port": str(self.port)}
            ),
            "dir": str(directory),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            "databases": "4",
        } | {name.replace("_", "-"): value for name, value in options.items()}
        self.process: subprocess.Popen[bytes] | None = None
        self._was_up = False  # until then it may take another port
        self.log_path = directory / "redis.log"

    @property
    def url(self) -> str:
        return f"redis{'s' if self._is_tls else ''}://127.0.0.1:{self.port}/0"

    def start(self, ready_s: float = 20.0) -> None:
        assert PROGRAM, "there is no redis-server here: run tests/setup"
        self.directory.mkdir(parents=True, exist_ok=True)
        arguments = [f(x) for n, v in self._options.items() for f, x in ((_option, n), (str, v))]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen([PROGRAM, *arguments], stdout=log, stderr=log)
        deadline = time.monotonic() + ready_s
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                # Tests run side by side: another one's server may have been faster at this port.
                if self.command("INFO", "server")["process_id"] == self.process.pid:
                    self._was_up = True
                    return
            except redis.RedisError:
                time.sleep(0.02)
        self.kill()
        if not self._was_up and "Address already in use" in self.log_path.read_text():
            self.log_path.unlink()
            self._options["tls-port" if self._is_tls else "port"] = str(port := _port())
            self.port = port
            self.start(ready_s)
            return
        raise AssertionError(f"Redis did not start:\n{self.log_path.read_text()[-2000:]}")

    def command(self, *words: Any) -> Any:
        """One command on a connection of its own."""
        with redis.Redis(port=self._plain_port or self.port, socket_timeout=5.0, retry=None) as client:
            return client.execute_command(*words)

    def kill(self) -> None:
        """SIGKILL, frozen or not."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)

    def freeze(self) -> None:
        """It accepts connections (the kernel does) and says nothing any more."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _port() -> int:
    """With room above it: a cluster's node also listens 10,000 higher."""
    while (port := free_port()) > 55_000:
        pass
    return port


def _option(name: str) -> str:
    return f"--{name}"
