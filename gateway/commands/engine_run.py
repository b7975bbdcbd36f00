"""`headgate engine run`: one model, served by the vLLM that is installed, without a configuration file.

Writes a configuration, which can be read and kept, and serves it. Weights are fetched by vLLM itself.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Final

import orjson
import typer

from gateway.commands.serve import serve
from local_engine.gpus import this_machine
from local_engine.installed import Vllm, find_vllm
from local_engine.vllm_config import served_name

_DIRECTORY: Final = Path(".headgate")
_FILE: Final = "run-vllm.yaml"
_POOL: Final = "local"
# Where `make engine-cpu` puts it.
_CPU_ENVIRONMENT: Final = Path(".venv-engine")
_NOTHING: Final = {"input": 0, "cached_input": 0, "output": 0}  # an engine of one's own
_NO_VLLM: Final = """\
vLLM is not installed{why}. Install one:
  on a machine with NVIDIA GPUs   pip install 'headgate[vllm]'
  without (Linux on x86-64)       make engine-cpu
"""


def run(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A repository (Qwen/Qwen3-0.6B), or a folder.")
    ],
    replicas: Annotated[int, typer.Option(min=1, help="Engines that serve it.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs of each.")] = 1,
    cache_mib: Annotated[
        int | None,
        typer.Option(min=1, help="Memory for the cache of each GPU, or of each engine on the CPU."),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to serve; 0: any free one.")] = 8080,
    management_port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8081,
    directory: Annotated[Path, typer.Option(help="Where data and the configuration go.")] = _DIRECTORY,
) -> None:
    """Serve one model with the vLLM that is installed."""
    machine = this_machine(os.environ)
    vllm = find_vllm(_environments(), has_gpu=bool(machine.gpus))
    if vllm is None:
        is_there = find_vllm(_environments(), has_gpu=True) is not None
        why = " for a machine without a GPU (the one that is there needs one)" if is_there else ""
        typer.echo(_NO_VLLM.format(why=why), err=True, nl=False)
        raise typer.Exit(1)
    folder = Path(model).expanduser()
    if folder.is_dir():
        model = str(folder.absolute())
    directory = directory.absolute()
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    values = _configuration(model, vllm)
    engine = values["pools"][_POOL]["vllm"]
    engine |= {"replicas": replicas, "tensor_parallel_size": tensor_parallel_size}
    if cache_mib is not None:
        engine["kv_cache_memory_bytes"] = cache_mib << 20
    values["storage"] = {"directory": str(directory)}
    values["server"] = {"port": port, "workers": 1}
    values["management"] = {"port": management_port}
    path = directory / _FILE
    path.write_bytes(orjson.dumps(values, option=orjson.OPT_INDENT_2))  # JSON is YAML, too
    where = "on the CPU" if vllm.is_for_cpu else f"on {len(machine.gpus)} GPUs"
    typer.echo(f"vLLM {vllm.version} {where}, model {served_name(model)}, configuration {path}", err=True)
    serve(path)


def _environments() -> list[Path]:
    command = shutil.which("vllm")
    found = [Path(sys.prefix), *([Path(command).resolve().parents[1]] if command else [])]
    return [*found, _CPU_ENVIRONMENT.absolute()]


def _configuration(model: str, vllm: Vllm) -> dict[str, Any]:
    engine: dict[str, Any] = {"model": model, "command": list(vllm.command)}
    if vllm.is_for_cpu:
        engine["gpus"] = "none"
    name = served_name(model)
    return {
        "pools": {_POOL: {"vllm": engine}},
        "models": {name: {"targets": [{"pool": _POOL, "model": name}], "price": _NOTHING}},
    }
