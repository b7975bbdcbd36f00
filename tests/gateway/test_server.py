import asyncio
import contextlib
import http.client
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import server
from gateway.server import available_cpus

ROOT = Path(__file__).parents[2]
CONFIG = """
server: {{port: 0, workers: 2, drain_timeout_s: {drain}, pre_stop_s: {pre_stop}}}
management: {{port: 0, open_metrics: true}}
logging: {{format: json}}
pools:
  demo:
    simulator: {{time_scale: {time_scale}}}
models:
  demo:
    targets: [{{pool: demo}}]
    price: {{input: 0.10, cached_input: 0.01, output: 0.40}}
  {more}
"""


class Service:
    """`headgate serve` in a process of its own."""

    def __init__(self, directory: Path, **settings) -> None:
        self.directory = directory
        self.config = directory / "config.yaml"
        self.settings = {"drain": 20, "pre_stop": 0, "time_scale": 0.2, "more": "", **settings}
        self.configure()
        self.out = ""
        self.start()

    def configure(self, **settings) -> None:
        self.settings |= settings
        draft = self.config.with_suffix(".draft")
        draft.write_text(CONFIG.format(**self.settings))
        draft.replace(self.config)

    def start(self) -> None:
        """Returns when the addresses are printed."""
        self.log = self.directory / "log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gateway", "serve", "--config", str(self.config)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self.out = self.read_until("Headgate is ready", "models")
        self.port = int(re.search(r"data plane +http://127.0.0.1:(\d+)", self.out)[1])
        self.management = int(re.search(r"management +http://127.0.0.1:(\d+)", self.out)[1])

    def read_until(self, *words: str) -> str:
        text = ""
        deadline = threading.Timer(60, self.process.kill)
        deadline.start()
        for line in self.process.stdout:
            text += line
            if all(word in text for word in words):
                break
        else:
            raise AssertionError(text + self.log.read_text())
        deadline.cancel()
        return text

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ended(self, timeout_s: float = 30) -> int:
        return self.process.wait(timeout_s)

    def children(self) -> list[int]:
        return [
            int(pid)
            for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def workers(self) -> list[int]:
        return [p for p in self.children() if b"gateway.worker" in Path(f"/proc/{p}/cmdline").read_bytes()]

    def ask(
        self, method: str, path: str, key: str = "", body: dict | None = None, *, port: int = 0
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=30)
        try:
            headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
            connection.request(method, path, json.dumps(body) if body is not None else None, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def chat(self, key: str, tokens: int = 4, **more) -> tuple[int, str]:
        message = {"role": "user", "content": "Hello"}
        body = {"model": "demo", "messages": [message], "max_tokens": tokens, "ignore_eos": True, **more}
        return self.ask("POST", "/v1/chat/completions", key, body)

    def metric(self, name: str) -> float:
        _, text = self.ask("GET", "/metrics", port=self.management)
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    def command(self, *words: str) -> str:
        command = [sys.executable, "-m", "gateway", *words, "--config", str(self.config)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture
def start(tmp_path) -> Iterator:
    services: list[Service] = []

    def begin(**settings) -> Service:
        services.append(Service(tmp_path, **settings))
        return services[-1]

    yield begin
    for service in services:
        service.end()


def key_in(out: str, kind: str = "sk") -> str:
    return re.search(kind + r"-hg-\w+", out)[0]


def until(condition, timeout_s: float = 40.0) -> None:
    deadline_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_at, "it did not happen in time"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Stream(threading.Thread):
    """A streamed answer, read to its end."""

    def __init__(self, service: Service, key: str, tokens: int) -> None:
        super().__init__()
        self.service, self.key, self.tokens = service, key, tokens
        self.text = ""
        self.has_begun = threading.Event()
        self.is_whole = False
        self.start()
        assert self.has_begun.wait(20)

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.service.port, timeout=60)
        message = {"role": "user", "content": "Hello"}
        body = {
            "model": "demo", "messages": [message], "stream": True, "max_tokens": self.tokens, "ignore_eos": True,
        }  # fmt: skip
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        try:
            while piece := response.read1():
                self.text += piece.decode()
                self.has_begun.set()
            self.is_whole = True
        except (http.client.IncompleteRead, ConnectionError):
            pass
        finally:
            connection.close()


@pytest.mark.e2e
def test_what_the_first_start_prints_works_when_pasted_and_is_printed_once(start):
    service = start(time_scale=0)
    text = service.out + service.read_until("What it cost", " costs\n")
    curl = next(line for line in text.splitlines() if line.startswith("curl "))
    answer = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, check=True).stdout
    assert json.loads(answer)["object"] == "chat.completion"
    python = text[text.index("from openai") : text.index("\nWhat it cost")]
    assert len(python.strip().splitlines()) == 3
    run = subprocess.run([sys.executable, "-c", python], capture_output=True, text=True, check=True)
    assert "simulator" in run.stdout
    command = text[text.index("What it cost") :].strip().splitlines()[-1]
    pasted = ["bash", "-c", command + " --json"]
    until(
        lambda: json.loads(subprocess.check_output(pasted, cwd=service.directory))["total"]["requests"] == 2
    )
    assert json.loads(service.command("costs", "--json"))["total"]["cost_nanousd"] > 0
    status, _ = service.ask("GET", "/api/status", key_in(text, "op"), port=service.management)
    assert status == 200

    service.signal(signal.SIGTERM)
    assert service.ended() == 0
    service.process.stdout.close()
    service.start()
    assert service.chat(key_in(text))[0] == 200
    service.signal(signal.SIGINT)
    assert service.ended() == 0
    assert "hg-" not in service.out + service.process.stdout.read()


def _refuses(service) -> bool:
    try:
        service.ask("GET", "/livez")
    except ConnectionRefusedError:
        return True
    except ConnectionError:  # it was in the kernel's queue when the socket closed
        return False
    return False


@pytest.mark.e2e
def test_sigterm_lets_a_stream_end_while_readiness_says_no_and_new_connections_are_refused(start):
    service = start(time_scale=1)
    key = key_in(service.out + service.read_until("costs"))
    stream = Stream(service, key, 150)
    service.signal(signal.SIGTERM)
    until(lambda: service.ask("GET", "/readyz", port=service.management)[0] == 503)
    until(lambda: _refuses(service))
    stream.join()
    assert stream.text.endswith("data: [DONE]\n\n")
    assert service.ended() == 0
    assert '"ended":"completed"' in service.log.read_text()


@pytest.mark.e2e
def test_before_it_stops_taking_requests_it_says_so_for_pre_stop_s(start):
    service = start(pre_stop=600, time_scale=0)
    key = key_in(service.out + service.read_until("costs"))
    service.signal(signal.SIGTERM)
    until(lambda: service.ask("GET", "/readyz")[0] == 503)
    assert service.chat(key)[0] == 200
    service.signal(signal.SIGTERM)  # need not be waited for
    assert service.ended() == 0


@pytest.mark.e2e
def test_a_second_signal_cuts_streams_with_an_error_in_band_and_still_writes_their_rows(start):
    service = start(time_scale=1)
    key = key_in(service.out + service.read_until("costs"))
    stream = Stream(service, key, 4000)
    service.signal(signal.SIGTERM)
    time.sleep(0.5)
    assert service.process.poll() is None
    service.signal(signal.SIGTERM)
    assert service.ended() == 0
    stream.join()
    assert not stream.is_whole
    assert '"error"' in stream.text.strip().rpartition("\n")[2]
    assert "[DONE]" not in stream.text
    total = json.loads(service.command("costs", "--json"))["total"]
    assert total["requests"] == total["estimated"] == 1
    assert total["cost_nanousd"] > 0


@pytest.mark.e2e
def test_no_process_outlives_a_parent_that_is_killed_and_nobody_else_gets_its_directory_before(start):
    service = start(time_scale=1)
    key = key_in(service.out + service.read_until("costs"))
    Stream(service, key, 4000)
    children = service.children()
    assert len(children) == 3
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(service.config)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Another Headgate uses the storage directory")
    service.signal(signal.SIGKILL)
    until(lambda: not any(map(is_running, children)))
    total = json.loads(service.command("costs", "--json"))["total"]
    assert total["requests"] == 1


@pytest.mark.e2e
def test_reload_crash_and_rotation_under_load_lose_nothing_they_need_not(start):
    service = start(time_scale=0)
    key = key_in(service.out + service.read_until("costs"))
    operator = key_in(service.command("keys", "create", "op", "--operator"), "op")

    # A reload reaches every worker, without a request failing.
    service.configure(more="more: {targets: [{pool: demo, model: demo}]}")
    service.signal(signal.SIGHUP)
    until(lambda: all("more" in service.ask("GET", "/v1/models", key)[1] for _ in range(12)))
    service.configure(more="more: {tragets: []}")
    until(lambda: service.ask("GET", "/api/status", operator, port=service.management)[0] == 200)
    status, told = service.ask("POST", "/api/reload", operator, port=service.management)
    assert status == 422
    assert "did you mean" in told
    assert service.metric('headgate_config_reloads_total{result="applied"}') >= 1
    assert all("more" in service.ask("GET", "/v1/models", key)[1] for _ in range(6))

    # A rotation under load: no connection lost.
    before = service.workers()
    results: list[int] = []
    is_over = threading.Event()

    def client() -> None:
        while not is_over.is_set():
            results.append(service.chat(key)[0])

    clients = [threading.Thread(target=client) for _ in range(3)]
    for each in clients:
        each.start()
    service.signal(signal.SIGUSR2)
    until(lambda: not set(before) & set(service.workers()) and len(service.workers()) == 2)
    is_over.set()
    for each in clients:
        each.join()
    assert len(results) > 20
    assert set(results) == {200}
    requests = len(results)
    until(lambda: json.loads(service.command("costs", "--json"))["total"]["requests"] == requests)
    assert service.metric("headgate_billed_requests_total") == requests, (
        "also what the replaced workers counted"
    )

    # A killed worker is replaced, and the request it had gets its row.
    service.configure(more="")
    for pid in service.workers():
        os.kill(pid, signal.SIGKILL)
    until(lambda: service.metric('headgate_workers{state="ready"}') == 2)
    assert service.chat(key)[0] == 200
    assert service.metric('headgate_worker_restarts_total{reason="crashed"}') == 2


@pytest.mark.e2e
def test_a_request_whose_worker_was_killed_gets_its_row(start):
    service = start(time_scale=1)
    key = key_in(service.out + service.read_until("costs"))
    Stream(service, key, 2000)
    for pid in service.workers():
        os.kill(pid, signal.SIGKILL)
    until(lambda: json.loads(service.command("costs", "--json"))["total"]["interrupted"] == 1)


@pytest.mark.e2e
def test_it_ends_with_the_terminal_it_was_started_from(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("server: {port: 0, workers: 1}\nmanagement: {port: 0}")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-m", "gateway", "serve", "--config", str(config)])
    shown = b""
    while b"Headgate is ready" not in shown:
        shown += os.read(terminal, 65536)
    os.close(terminal)
    deadline_at = time.monotonic() + 40
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline_at, "it is still there"
        time.sleep(0.05)


def serve(tmp_path: Path, config: str, *words: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "config.yaml"
    path.write_text(config)
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(path), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_a_port_that_is_taken_is_a_sentence_and_nothing_is_made(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        ended = serve(tmp_path, f"server: {{port: {port}}}")
    assert ended.returncode == 1
    assert ended.stderr == (
        f"Cannot listen on 127.0.0.1 port {port}: the port is in use: stop what listens there, "
        "or choose another server.port.\n"
    )
    assert ended.stdout == ""
    assert not (tmp_path / ".headgate").exists()


def test_every_problem_of_a_configuration_is_listed(tmp_path):
    ended = serve(tmp_path, "server: {prot: 1}\nmodels: {demo: {targets: [{pool: nowhere}]}}")
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 2
    assert "prot" in ended.stderr
    assert "nowhere" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_storage_directory_that_cannot_be_used_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    ended = serve(tmp_path, "storage: {directory: file}", "--port", "0", "--management-port", "0")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "storage" in ended.stderr


def test_workers_auto_counts_the_cpus_this_process_may_use():
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, mask)


async def test_systemd_is_told_when_it_asked(tmp_path, monkeypatch):
    address = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(address))
        monkeypatch.setenv("NOTIFY_SOCKET", str(address))
        server._notify("READY=1")
        systemd.setblocking(False)
        assert await asyncio.get_running_loop().sock_recv(systemd, 64) == b"READY=1"
    server._notify("STOPPING=1")  # nobody listens any more: not an error
