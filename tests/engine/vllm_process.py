"""One real vLLM on the CPU, as a child process of the tests."""

import contextlib
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.support.gateway_process import free_port

ENVIRONMENT = Path(__file__).parents[2] / ".venv-engine"
PYTHON = ENVIRONMENT / "bin/python"
MODELS = ENVIRONMENT / "models"  # written by tests/engine/setup
READY_S = 180.0  # about 25 s on two free cores, and these are never free


class Vllm:
    """A replica. Its own process group: killing the API process alone would leave the engine running."""

    def __init__(self, model: str, log: Path, *arguments: str) -> None:
        assert (MODELS / model).exists(), "the engine is not installed: run tests/engine/setup"
        self.port = free_port()
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self._log = log
        command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.launchers.api_server.entry"),
            *("--host", "127.0.0.1", "--port", str(self.port)),
            *("--model", str(MODELS / model), "--served-model-name", model),
            *("--enforce-eager", "--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", "67108864"),
            *arguments,
        ]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several replicas share the cores
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "TORCHDYNAMO_DISABLE": "1",  # else the first logprobs call wants a C++ compiler
        }
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdout=file, stderr=file, env=environment, start_new_session=True
            )

    def wait_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self.is_alive():
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        self.kill()
        raise AssertionError(f"vLLM did not start:\n{self._log.read_text(errors='replace')[-3000:]}")

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def metric(self, name: str) -> float:
        """Of the engine's own metrics page: `num_requests_running`; the sum over labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"vllm:{name}{{")]
        assert values, f"no vllm:{name} on the metrics page"
        return sum(values)

    def kill(self) -> None:
        """SIGKILL to all of its processes at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(timeout=30)

    def kill_engine(self) -> None:
        """SIGKILL to the process that computes; the one that speaks HTTP lives on to tell of it."""
        pid = self._process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        engines = [int(c) for c in children if "EngineCore" in Path(f"/proc/{c}/cmdline").read_text()]
        assert len(engines) == 1, children
        os.kill(engines[0], signal.SIGKILL)
