"""Other gateways beside ours: installed on request from the package registries by pip and npm into bench/build, run as their documents say.

Each runs one worker with the features it needs to do the same job; what a peer lacks (a key check, prices) is said in README.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import native, processes
from bench.targets import BEARER, KEY, MODELS, Place, Target


@dataclass(frozen=True)
class Peer:
    packages: Sequence[str]
    start: Callable[[Path, Place], Target]
    is_npm: bool = False


def install(name: str, directory: Path) -> Path:
    """Installs a peer once; later runs use what is there. Returns its home: a virtual environment or an npm prefix."""
    peer, home = PEERS[name], directory / name
    done = home / "installed"
    if done.exists():
        return home
    print(f"installing {name} into {home}", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    if peer.is_npm:
        (home / "package.json").write_text(json.dumps({"private": True, "overrides": NPM_OVERRIDES}))
        steps = [
            [
                native.find("npm", "npm"),
                "install",
                "--no-audit",
                "--no-fund",
                "--prefix",
                str(home),
                *peer.packages,
            ]
        ]
    else:
        steps = [[sys.executable, "-m", "venv", str(home)]]
        steps.append([str(home / "bin" / "python"), "-m", "pip", "install", "-q", *peer.packages])
    for step in steps:
        result = subprocess.run(step, capture_output=True, text=True, check=False)
        if result.returncode:
            raise native.BenchError(f"{name} cannot be installed:\n{(result.stdout + result.stderr)[-3000:]}")
    done.touch()
    return home


def start(name: str, home: Path, place: Place) -> Target:
    return PEERS[name].start(home, place)


def pip_version(home: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return f"{package} {native.version(str(home / 'bin' / 'python'), '-c', code)}"


def start_litellm(home: Path, place: Place) -> Target:
    port = processes.free_port()
    price = {
        "input_cost_per_token": 2.5e-7,
        "output_cost_per_token": 2e-6,
        "cache_read_input_token_cost": 2.5e-8,
    }
    upstream = {"api_base": f"http://127.0.0.1:{place.mock_port}/v1", "api_key": "none", **price}
    config = {
        "model_list": [
            {"model_name": m, "litellm_params": {"model": f"openai/{m}", **upstream}} for m in MODELS
        ],
        "general_settings": {"master_key": KEY},
        "litellm_settings": {"telemetry": False},
    }
    place.directory.mkdir(parents=True, exist_ok=True)
    path = place.directory / "config.yaml"
    path.write_text(json.dumps(config))
    command = [
        str(home / "bin" / "litellm"),
        "--config",
        str(path),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--num_workers", "1", "--run_granian"]
    place.env = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    return place.launch("litellm", command, port, pip_version(home, "litellm"))


def start_portkey(home: Path, place: Place) -> Target:
    port = processes.free_port()
    package = home / "node_modules" / "@portkey-ai" / "gateway"
    version = json.loads((package / "package.json").read_text())["version"]
    script = package / "build" / "start-server.js"
    headers = (
        *BEARER,
        "x-portkey-provider: openai",
        f"x-portkey-custom-host: http://127.0.0.1:{place.mock_port}/v1",
    )
    # Private addresses are refused unless they are named.
    place.env = {"TRUSTED_CUSTOM_HOSTS": "localhost,127.0.0.1", "NODE_ENV": "production"}
    command = [native.find("node", "nodejs"), str(script), "--headless", f"--port={port}"]
    return place.launch("portkey", command, port, f"@portkey-ai/gateway {version}", headers)


def start_sglang_router(home: Path, place: Place) -> Target:
    port, metrics_port = processes.free_port(), processes.free_port()
    command = [
        str(home / "bin" / "python"),
        "-m",
        "sglang_router.launch_router",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += [
        "--worker-urls",
        f"http://127.0.0.1:{place.mock_port}",
        "--policy",
        "cache_aware",
        "--api-key",
        KEY,
    ]
    command += ["--prometheus-port", str(metrics_port), "--log-level", "error"]
    return place.launch("sglang-router", command, port, pip_version(home, "sglang-router"))


def start_vllm_router(home: Path, place: Place) -> Target:
    port, metrics_port = processes.free_port(), processes.free_port()
    command = [str(home / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"http://127.0.0.1:{place.mock_port}", "--policy", "consistent_hash"]
    command += ["--prometheus-port", str(metrics_port), "--log-level", "error"]
    return place.launch("vllm-router", command, port, pip_version(home, "vllm-router"))


# With @hono/node-server 1.19 every streamed answer of Portkey 1.15 fails ("TypeError: immutable").
NPM_OVERRIDES = {"@hono/node-server": "1.13.8"}

PEERS = {
    "litellm": Peer(("litellm[proxy]", "granian", "opentelemetry-api", "opentelemetry-sdk"), start_litellm),
    "portkey": Peer(("@portkey-ai/gateway",), start_portkey, is_npm=True),
    "sglang-router": Peer(("sglang-router",), start_sglang_router),
    "vllm-router": Peer(("vllm-router",), start_vllm_router),
}
