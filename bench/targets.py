"""What is measured: nginx, Headgate with its features off, with accounting on, with limits or an access log too, compiled, any command, and the mock hit directly.

A target knows how to start itself in front of the mock and which of its processes do the work; it knows nothing of scenarios.
Every target serves POST /v1/chat/completions on 127.0.0.1 and takes the bench's key.
"""

from __future__ import annotations

import http.client
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import native, processes

KEY = "sk-bench-0123456789abcdef0123456789abcdef"
BEARER = (f"authorization: Bearer {KEY}",)
MODELS = ("bench", "burst-64", "paced-64-20", "paced-150-20", "paced-500-20", "delay-20", "delay-20.burst-16")


@dataclass
class Target:
    """A started target. `process` is None for the mock itself, which is then measured on the other core."""

    name: str
    port: int
    process: subprocess.Popen[bytes] | None = None
    headers: Sequence[str] = BEARER
    version: str = ""
    mock_pid: int = 0
    start_s: float = 0.0  # from its launch to its first right answer

    def workers(self) -> list[int]:
        """The processes that serve requests: the children, or the process itself when it has none."""
        if self.process is None:
            return [self.mock_pid]
        return processes.descendants(self.process.pid) or [self.process.pid]

    def parents(self) -> list[int]:
        if self.process is None or self.workers() == [self.process.pid]:
            return []
        return [self.process.pid]


@dataclass
class Mock:
    process: subprocess.Popen[bytes]
    port: int

    def stats(self) -> dict[str, int]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", "/stats")
            return dict(json.loads(connection.getresponse().read()))
        finally:
            connection.close()


def start_mock(core: int) -> Mock:
    program = native.compile_program("mock_upstream")
    process = processes.start([str(program)], core, log=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if process.stdout is None:
        raise AssertionError
    return Mock(process, int(process.stdout.readline().split()[1]))


@dataclass
class Place:
    """Where a target runs: its directory for generated files and logs, the mock's port, its core."""

    directory: Path
    mock_port: int
    core: int
    env: Mapping[str, str] = field(default_factory=dict)

    def launch(
        self, name: str, command: Sequence[str], port: int, version: str, headers: Sequence[str] = BEARER
    ) -> Target:
        """Starts the command and waits until it answers a completion through to the mock."""
        self.directory.mkdir(parents=True, exist_ok=True)
        log_path = self.directory / "log.txt"
        with log_path.open("wb") as log:
            process = processes.start(command, self.core, log=log, env=self.env)
        target = Target(name, port, process, headers, version)
        launched_at = time.monotonic()
        wait_ready(target, log_path)
        target.start_s = time.monotonic() - launched_at
        return target


def wait_ready(target: Target, log_path: Path, patience_s: float = 120.0, model: str = "bench") -> None:
    give_up_at = time.monotonic() + patience_s
    question = {"model": model, "stream": False, "messages": [{"role": "user", "content": "ready?"}]}
    body = json.dumps(question).encode()
    headers = dict(line.split(": ", 1) for line in target.headers) | {"content-type": "application/json"}
    problem = "no answer"
    while time.monotonic() < give_up_at:
        if target.process is not None and target.process.poll() is not None:
            problem = f"ended with {target.process.returncode}"
            break
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=10)
        try:
            connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status == 200:
                return
            problem = f"status {answer.status}: {text[:300]!r}"
        except OSError as error:
            problem = str(error)
        finally:
            connection.close()
        time.sleep(0.05)
    if target.process is not None:
        processes.stop(target.process)
    tail = log_path.read_text(errors="replace")[-3000:]
    raise native.BenchError(f"{target.name} does not serve: {problem}\n{log_path}:\n{tail}")


def start_direct(mock: Mock) -> Target:
    return Target("direct", mock.port, None, version="the mock itself", mock_pid=mock.process.pid)


NGINX_CONFIG = """\
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log {directory}/error.log warn;
worker_rlimit_nofile 16384;
events {{ worker_connections 16000; multi_accept on; }}
http {{
  access_log off; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 300s;
  client_max_body_size 64m; client_body_buffer_size 2m;
  client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy; fastcgi_temp_path {directory}/fastcgi;
  uwsgi_temp_path {directory}/uwsgi; scgi_temp_path {directory}/scgi;
  map_hash_bucket_size 256;
  map $http_authorization $is_known {{ default 0; "Bearer {key}" 1; }}
  upstream mock {{ server 127.0.0.1:{mock_port}; keepalive 2048; keepalive_requests 100000000; keepalive_timeout 300s; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      if ($is_known = 0) {{ return 401; }}
      proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Authorization "";
      proxy_buffering off; proxy_read_timeout 600s; proxy_send_timeout 600s;
    }}
  }}
}}
"""


def start_nginx(place: Place) -> Target:
    program = native.find("nginx", "nginx-light")
    port = processes.free_port()
    place.directory.mkdir(parents=True, exist_ok=True)
    config = place.directory / "nginx.conf"
    config.write_text(
        NGINX_CONFIG.format(directory=place.directory, key=KEY, mock_port=place.mock_port, port=port)
    )
    command = [
        program,
        "-c",
        str(config),
        "-p",
        str(place.directory),
        "-e",
        str(place.directory / "start.log"),
    ]
    return place.launch("nginx", command, port, native.version(program, "-v").partition("/")[2])


def start_command(place: Place, command: str) -> Target:
    """Any server: {port} and {upstream} in its words are filled in, BENCH_KEY is in its environment."""
    port = processes.free_port()
    filled = command.format(port=port, upstream=f"http://127.0.0.1:{place.mock_port}")
    return place.launch("cmd", shlex.split(filled), port, filled)


# Three levels, far from their end: what a busy key's requests pass every day.
LIMITS = (
    {"scope": "key:*", "requests": 60_000_000, "per": "60s"},
    {"scope": "team:bench", "tokens": 600_000_000_000, "per": "60s"},
    {"scope": "org:bench", "usd": 1_000_000, "per": "month"},
)


COMPILED_PYTHON = native.HERE.parent / ".venv-compiled/bin/python"


def start_compiled(place: Place, name: str, *, is_limited: bool = False) -> Target:
    """The compiled build that `make compiled` has installed, which may be of another commit than the checkout."""
    if not COMPILED_PYTHON.exists():
        raise native.BenchError(f"{name} needs the compiled build: make compiled")
    return start_headgate(place, name, is_limited=is_limited, python=str(COMPILED_PYTHON))


def start_headgate(
    place: Place,
    name: str,
    *,
    is_priced: bool = True,
    logs: bool = False,
    is_limited: bool = False,
    python: str = sys.executable,
) -> Target:
    port, management_port = processes.free_port(), processes.free_port()
    place.directory.mkdir(parents=True, exist_ok=True)
    config = place.directory / "config.yaml"
    price = {"input": 0.25, "cached_input": 0.025, "output": 2.0}
    settings = {
        "server": {"host": "127.0.0.1", "port": port, "workers": 1, "drain_timeout_s": 2},
        "management": {"port": management_port},
        "storage": {"directory": str(place.directory / "storage")},
        "logging": {"access": logs},
        "keys": [{"name": "bench", "key": KEY, "team": "bench"}],
        "teams": {"bench": {"organisation": "bench"}},
        "limits": {"rules": LIMITS if is_limited else ()},
        "pools": {"mock": {"type": "vllm", "endpoints": [f"http://127.0.0.1:{place.mock_port}/v1"]}},
        "models": {
            model: {"targets": [{"pool": "mock", "model": model}], **({"price": price} if is_priced else {})}
            for model in MODELS
        },
    }
    config.write_text(json.dumps(settings, indent=1))  # JSON is YAML
    program = [python, "-P", "-m", "gateway"]  # -P: what is installed there, not what lies here
    version = native.version(*program, "version")
    return place.launch(name, [*program, "serve", "--config", str(config)], port, version)


DEFAULT = ("nginx", "headgate-off", "headgate")
STARTERS: dict[str, Callable[[Place], Target]] = {
    "nginx": start_nginx,
    "headgate-off": lambda place: start_headgate(place, "headgate-off", is_priced=False),
    "headgate": lambda place: start_headgate(place, "headgate"),
    "headgate-limits": lambda place: start_headgate(place, "headgate-limits", is_limited=True),
    "headgate-compiled": lambda place: start_compiled(place, "headgate-compiled"),
    "headgate-compiled-limits": lambda place: start_compiled(
        place, "headgate-compiled-limits", is_limited=True
    ),
    "headgate-logs": lambda place: start_headgate(place, "headgate-logs", logs=True),
}
