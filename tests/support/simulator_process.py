"""The engine simulator as a child process, for tests that need a real one."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]


class SimulatorProcess:
    """Started by `with`. Options are the command line's, underscores for hyphens; True is a bare flag."""

    def __init__(self, **options: Any) -> None:
        # Should the tests be killed, it goes with them.
        self._options = {"port": 0, "time_scale": 0, "parent_pid": os.getpid()} | options
        self.process: subprocess.Popen[str]
        self.url = ""

    def __enter__(self) -> Self:
        options = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in self._options.items()
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "local_engine.simulator", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        found = re.search(r"ready on (http://\S+)", ready)
        assert found, f"the simulator did not start: {ready!r}"
        self.url = found[1]
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metrics(self) -> dict[str, float]:
        """Series of the engine by name, as `request_success_total{finished_reason="stop"}`; its own labels only."""
        series = {}
        for line in self.get("/metrics").decode().splitlines():
            if line.startswith("vllm:"):
                name, value = line.removeprefix("vllm:").rsplit(" ", 1)
                own = (
                    re.sub(r'(?:engine|model_name)="[^"]*",?', "", name).replace(",}", "}").removesuffix("{}")
                )
                series[own] = float(value)
        return series

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read()

    def fault(self, fault: str | None, count: int | None = None) -> None:
        """Needs `allow_faults=True`."""
        self.post("/sim/fault", json.dumps({"fault": fault, "count": count}).encode())

    def post(self, path: str, body: bytes) -> bytes:
        request = urllib.request.Request(self.url + path, body, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read()
