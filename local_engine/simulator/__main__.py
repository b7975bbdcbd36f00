"""`python -m local_engine.simulator`: one simulated engine as a process.

Owns the command line, the listening socket, the signals and the one line on standard output that says where it
listens. Ends on SIGTERM as vLLM does (at once, or after `--shutdown-timeout` seconds of draining), and with its
parent if `--parent-pid` names one.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from typing import Final

import msgspec
import uvloop
from aiohttp import web

from local_engine.simulator import FINGERPRINT
from local_engine.simulator.app import Simulator
from local_engine.simulator.engine import EngineSettings
from local_engine.simulator.transfer import TransferConfig

_FLUSH_S: Final = 0.2  # for the last bytes of broken-off answers
_PARENT_POLL_S: Final = 1.0


def arguments() -> argparse.ArgumentParser:
    usual = EngineSettings()
    parser = argparse.ArgumentParser(
        prog="python -m local_engine.simulator", description="A vLLM stand-in, without a model."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 picks a free one")
    parser.add_argument("--fd", type=int, help="an inherited listening socket, instead of --host and --port")
    parser.add_argument("--model", default="demo", help="the name it is served under")
    parser.add_argument("--seed", type=int, default=0, help="answers are a function of it and of the prompt")
    parser.add_argument(
        "--time-scale", type=float, default=1.0, help="0 answers at once, 2 takes twice as long"
    )
    parser.add_argument("--block-size", type=int, default=usual.block_size)
    parser.add_argument("--num-blocks", type=int, default=usual.num_blocks)
    parser.add_argument("--max-num-seqs", type=int, default=usual.max_num_seqs)
    parser.add_argument("--max-num-queued-reqs", type=int, help="more waiting than this is answered 503")
    parser.add_argument(
        "--max-num-queued-tokens", type=int, help="the same for the tokens of waiting prompts"
    )
    parser.add_argument("--max-num-batched-tokens", type=int, default=usual.max_num_batched_tokens)
    parser.add_argument("--max-model-len", type=int, default=usual.max_model_len)
    parser.add_argument("--prefill-overhead-us", type=float, default=usual.prefill_overhead_us)
    parser.add_argument("--prefill-us-per-token", type=float, default=usual.prefill_us_per_token)
    parser.add_argument("--decode-us-per-token", type=float, default=usual.decode_us_per_token)
    parser.add_argument(
        "--load-factor", type=float, default=usual.load_factor, help="decode slow-down of a full batch"
    )
    parser.add_argument(
        "--kv-read-us-per-token",
        type=float,
        default=usual.kv_read_us_per_token,
        help="decode slow-down of long contexts",
    )
    parser.add_argument("--step-floor-us", type=float, default=usual.step_floor_us)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0, help="seconds to finish in on SIGTERM")
    parser.add_argument("--allow-faults", action="store_true", help="obey x-sim-fault and POST /sim/fault")
    parser.add_argument("--kv-transfer-config", help="vLLM's, of a NixlConnector: prefill here, decode there")
    parser.add_argument("--parent-pid", type=int, help="end when this process does")
    return parser


def settings_from(options: argparse.Namespace) -> EngineSettings:
    """ValueError with a sentence on values that cannot work together."""
    names = [name for name in EngineSettings.__dataclass_fields__ if hasattr(options, name)]
    return EngineSettings(**{name: getattr(options, name) for name in names})


def transfers_from(options: argparse.Namespace) -> TransferConfig | None:
    """ValueError with a sentence on what the simulator does not know."""
    given = options.kv_transfer_config
    try:
        return None if given is None else msgspec.json.decode(given, type=TransferConfig)
    except msgspec.DecodeError as error:
        raise ValueError(f"--kv-transfer-config: {error}") from error


async def serve(options: argparse.Namespace) -> None:
    """Listen, say so, and return once stopped."""
    loop = asyncio.get_running_loop()
    simulator = Simulator(
        settings_from(options),
        options.model,
        seed=options.seed,
        time_scale=options.time_scale,
        allow_faults=options.allow_faults,
        transfers=transfers_from(options),
    )
    protocols = simulator.http_server()
    if options.fd is not None:
        server = await loop.create_server(protocols, sock=socket.socket(fileno=options.fd), backlog=1024)
    else:
        server = await loop.create_server(protocols, options.host, options.port, backlog=1024)
    stopping = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopping.set)
    if options.parent_pid is not None:
        _watch_parent(loop, options.parent_pid, stopping)
    host, port = server.sockets[0].getsockname()[:2]
    if simulator.connector is not None:
        simulator.connector.port = port
    ready = f"{FINGERPRINT} ready on http://{host}:{port} model={options.model} pid={os.getpid()}"
    with contextlib.suppress(OSError):  # nobody has to read it
        print(ready, flush=True)  # noqa: T201 - the one line it prints
    await stopping.wait()
    await simulator.stop(options.shutdown_timeout)
    server.close()
    await _finish(protocols)


async def _finish(protocols: web.Server) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2 * _FLUSH_S):
            await protocols.shutdown(_FLUSH_S)


def _watch_parent(loop: asyncio.AbstractEventLoop, pid: int, stopping: asyncio.Event) -> None:
    """Stop when process `pid` ends: at once where the kernel can tell, else within a second."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        stopping.set()
    except (AttributeError, OSError):
        _poll_parent(loop, pid, stopping)
    else:
        loop.add_reader(watched, stopping.set)


def _poll_parent(loop: asyncio.AbstractEventLoop, pid: int, stopping: asyncio.Event) -> None:
    if os.getppid() == pid:
        loop.call_later(_PARENT_POLL_S, _poll_parent, loop, pid, stopping)
    else:
        stopping.set()


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if options.time_scale < 0 or options.shutdown_timeout < 0:
        parser.error("--time-scale and --shutdown-timeout must not be negative")
    try:
        settings_from(options)
        transfers_from(options)
    except ValueError as error:
        parser.error(str(error))
    try:
        uvloop.run(serve(options))
    except OSError as error:
        sys.exit(f"cannot listen on {options.host}:{options.port}: {error.strerror or error}")


if __name__ == "__main__":
    main()
