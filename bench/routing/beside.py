"""`python -m bench.routing.beside`: this gateway and other routers in front of the same simulated engines, over HTTP.

Each in turn, one worker, its engines started afresh, the same conversations. Hit rates are the engines' own; the balance is
of prompts answered. Peers are those of `bench/peers.py`: named with --with, installed on request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bench import native, peers, processes, targets
from bench.routing.live import LiveTraffic, balance, play
from bench.routing.report import table

ROOT = native.HERE.parent
RESULTS = native.HERE / "routing" / "BESIDE.md"
OWN = ("session", "prefix", "round-robin")
# Name -> the peer it belongs to, its policy.
PEER_POLICIES = {
    "vllm-router consistent_hash": ("vllm-router", "consistent_hash"),
    "vllm-router cache_aware": ("vllm-router", "cache_aware"),
    "sglang-router cache_aware": ("sglang-router", "cache_aware"),
}
# Blocks of KV memory: together a little more than the contexts of all conversations.
REPLICA = (
    "--num-blocks",
    "800",
    "--max-model-len",
    "8192",
    "--prefill-overhead-us",
    "5000",
    "--max-num-seqs",
    "64",
)


def main() -> int:
    words = argparse.ArgumentParser(prog="python -m bench.routing.beside", description=__doc__)
    words.add_argument("--with", dest="peers", default="", help="by comma: vllm-router, sglang-router")
    words.add_argument(
        "--peers-dir", type=Path, default=native.BUILD / "peers", help="where peers are installed"
    )
    words.add_argument("--replicas", type=int, default=4)
    words.add_argument("--conversations", type=int, default=24)
    words.add_argument("--turns", type=int, default=8)
    words.add_argument("--wait-s", type=float, default=1.0)
    options = words.parse_args()
    wanted = [name for name in options.peers.split(",") if name]
    homes = {name: peers.install(name, options.peers_dir) for name in wanted}
    rows = [
        measure(policy, options, lambda urls, folder, p=policy: headgate(urls, folder, p)) for policy in OWN
    ]
    for name, (peer, policy) in PEER_POLICIES.items():
        if peer in homes:
            rows.append(
                measure(name, options, lambda urls, _, h=homes[peer], p=peer, q=policy: router(urls, h, p, q))
            )
    head = (
        "router",
        "hit rate",
        "first token p50 s",
        "p90",
        "turns",
        "seconds",
        "max/mean prompts",
        "errors",
    )
    text = "\n".join([*about(options, homes), *table(head, rows)]) + "\n"
    print(text)
    if homes:
        RESULTS.write_text(text)
    return 0


def about(options: argparse.Namespace, homes: Mapping[str, Path]) -> list[str]:
    versions = [peers.pip_version(home, name) for name, home in homes.items()]
    return [
        "# Beside other routers",
        "",
        "Written by `python -m bench.routing.beside`; how: [README.md](README.md). Over HTTP, in real time, on a shared machine:",
        "hit rates and balance are the point, times are for order only.",
        "",
        f"{options.replicas} simulated engines, {options.conversations} conversations of {options.turns} turns; {', '.join(versions)}.",
        "Peers run with their default thresholds.",
        "",
    ]


def measure(
    name: str,
    options: argparse.Namespace,
    start: Callable[[Sequence[str], Path], contextlib.AbstractContextManager[str]],
) -> list[object]:
    print(f"{name} ...", file=sys.stderr, flush=True)
    traffic = LiveTraffic(
        nonce="beside", conversations=options.conversations, turns=options.turns, wait_s=options.wait_s
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = [stack.enter_context(replica(number)) for number in range(options.replicas)]
        address = stack.enter_context(start(urls, folder))
        headers = {"authorization": f"Bearer {targets.KEY}"}
        before = [answered(url) for url in urls]
        record = asyncio.run(play(f"{address}/v1", "sim", headers, traffic))
        after = [answered(url) for url in urls]
    if record.errors:
        print(f"  {record.errors[:2]}", file=sys.stderr)
    return [
        name,
        f"{100 * record.hit_rate:.1f} %",
        f"{record.ttft_p50_s:.3f}",
        f"{record.quantile_s(0.9):.3f}",
        len(record.ttft_s),
        f"{record.seconds:.0f}",
        f"{balance(before, after):.2f}",
        len(record.errors),
    ]


@contextlib.contextmanager
def replica(number: int) -> Iterator[str]:
    command = [sys.executable, "-m", "local_engine.simulator", "--port", "0", "--model", "sim", *REPLICA]
    command += ["--parent-pid", str(os.getpid()), "--seed", str(number)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        found = re.search(r"ready on (http://\S+)", process.stdout.readline())
        if found is None:
            raise native.BenchError("a simulator did not start")
        yield found[1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def answered(url: str) -> float:
    """Prompts that this engine has answered."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("vllm:request_success_total")
    )


@contextlib.contextmanager
def headgate(urls: Sequence[str], folder: Path, policy: str) -> Iterator[str]:
    port, management_port = processes.free_port(), processes.free_port()
    pool = {"type": "vllm", "endpoints": [f"{url}/v1" for url in urls], "placement": {"policy": policy}}
    config = {
        "server": {"port": port, "workers": 1},
        "management": {"port": management_port},
        "storage": {"directory": str(folder / "data")},
        "keys": [{"name": "bench", "key": targets.KEY}],
        "pools": {"sim": pool},
        "models": {"sim": {"targets": [{"pool": "sim", "model": "sim"}]}},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "gateway", "serve", "--config", str(path)]
    with _serving(command, port, folder / "log.txt"):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def router(urls: Sequence[str], home: Path, peer: str, policy: str) -> Iterator[str]:
    port = processes.free_port()
    python = str(home / "bin" / "python")
    start = [str(home / "bin" / "vllm-router")]
    if peer == "sglang-router":
        start = [python, "-m", "sglang_router.launch_router", "--api-key", targets.KEY]
    command = [*start, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", *urls, "--policy", policy]
    command += ["--prometheus-port", str(processes.free_port()), "--log-level", "error"]
    with tempfile.NamedTemporaryFile() as log, _serving(command, port, Path(log.name)):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _serving(command: Sequence[str], port: int, log_path: Path) -> Iterator[None]:
    """Until it answers a chat through to a replica; ended with the context."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
    try:
        target = targets.Target("router", port, process)
        targets.wait_ready(target, log_path, model="sim")
        yield
    finally:
        processes.stop(process)


if __name__ == "__main__":
    sys.exit(main())
