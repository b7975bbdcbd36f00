import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from local_engine.processes import Backoff, Child, StartError, answers_ok, free_ports

SERVER = textwrap.dedent(
    """
    import http.server, subprocess, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
        def log_message(self, *args):
            pass
    if len(sys.argv) > 2:  # a grandchild, as engines have
        grandchild = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open(sys.argv[2], "w").write(str(grandchild.pid))
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    """
)


def a_child(*more: str) -> tuple[Child, int]:
    (port,) = free_ports(1)

    async def is_ready() -> bool:
        return await answers_ok("127.0.0.1", port, "/health")

    return Child("engine", [sys.executable, "-c", SERVER, str(port), *more], is_ready), port


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def until(condition, timeout_s: float = 30.0) -> None:
    deadline_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_at, "it did not happen in time"
        await asyncio.sleep(0.02)


async def test_start_returns_when_the_child_answers_and_stop_ends_its_whole_group(tmp_path):
    note = tmp_path / "grandchild"
    child, port = a_child(str(note))
    await child.start()
    try:
        assert await answers_ok("127.0.0.1", port, "/health")
        assert not await answers_ok("127.0.0.1", port, "/other")
        pid, grandchild = child.pid, int(note.read_text())
    finally:
        await child.stop()
    assert not is_running(pid)
    await until(lambda: not is_running(grandchild))


async def test_a_child_that_dies_is_started_again_on_the_same_port():
    child, port = a_child()
    await child.start()
    try:
        first = child.pid
        os.kill(first, signal.SIGKILL)
        await until(lambda: child.restarts == 1 and child.pid != first)
        while not await answers_ok("127.0.0.1", port, "/health"):
            await asyncio.sleep(0.02)
    finally:
        await child.stop()


async def test_a_child_that_ends_before_it_is_ready_is_an_error_with_its_code():
    async def never() -> bool:
        return False

    child = Child("engine", [sys.executable, "-c", "raise SystemExit(3)"], never)
    with pytest.raises(StartError, match="engine ended with code 3"):
        await child.start()


async def test_a_child_that_never_becomes_ready_is_ended():
    async def never() -> bool:
        return False

    child = Child("engine", [sys.executable, "-c", "import time; time.sleep(60)"], never)
    with pytest.raises(StartError, match=r"not ready after 0\.3 s"):
        await child.start(timeout_s=0.3)
    assert not is_running(child.pid)


async def test_a_child_that_ignores_sigterm_is_killed_after_the_grace():
    async def at_once() -> bool:
        return True

    stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    child = Child("engine", [sys.executable, "-c", stubborn], at_once)
    await child.start()
    await child.stop(grace_s=0.3)
    assert not is_running(child.pid)


async def test_no_child_outlives_a_parent_that_is_killed(tmp_path):
    note = tmp_path / "pid"
    parent_code = textwrap.dedent(
        f"""
        import asyncio, pathlib, sys
        from local_engine.processes import Child
        async def at_once():
            return True
        async def main():
            child = Child("engine", [sys.executable, "-c", "import time; time.sleep(60)"], at_once)
            await child.start()
            pathlib.Path({str(note)!r}).write_text(str(child.pid))
            await asyncio.sleep(60)
        asyncio.run(main())
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", parent_code], cwd=Path(__file__).parents[2])
    try:
        await until(lambda: note.exists() and note.read_text() != "")
    finally:
        parent.kill()
        parent.wait()
    await until(lambda: not is_running(int(note.read_text())))


def test_the_first_deaths_cost_no_wait_then_it_doubles_up_to_a_cap_and_forgets():
    backoff = Backoff(free=2, window_s=30, max_s=5)
    assert [backoff.died(now) for now in (0, 1, 2, 3, 4, 5, 6)] == [0, 0, 1, 2, 4, 5, 5]
    assert backoff.died(100) == 0


def test_free_ports_differ_and_are_below_the_kernels_outgoing_range():
    lowest_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert max(ports) < lowest_outgoing
