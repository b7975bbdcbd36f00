"""The command line and the environment of one vLLM process.

Owns vLLM's flags: which setting becomes which, what Headgate asks for in every case, and what an engine on the CPU
needs besides. Refuses to know other replicas and what the machine has. Nothing secret is in the arguments, which
everybody on the machine can read. The operator's `extra_args` are last, where vLLM takes the later of two.

Flags and their defaults: vLLM's `vllm/engine/arg_utils.py` and `vllm/entrypoints/launchers/cli_args.py`.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from local_engine.presets import NONE, Model
from local_engine.vllm_config import Role, VllmConfig

API_KEY_VARIABLE: Final = "VLLM_API_KEY"
_RPC_PORT: Final = 29550  # vLLM's own default
_MIB: Final = 1 << 20
# Engines on the CPU take a sixteenth of the memory for their caches, all together; each has between these.
_CPU_CACHE_BYTES: Final = (64 * _MIB, 4096 * _MIB)
# The check that memory is free counts this share of it; the cache has its own size.
_CPU_MEMORY_SHARE: Final = 0.05
# What an engine may see of the environment that Headgate runs in, which has the keys of providers in it.
_INHERITED: Final = frozenset(
    {
        "HOME",
        "HOSTNAME",
        "LANG",
        "LANGUAGE",
        "LOGNAME",
        "PATH",
        "SHELL",
        "TMPDIR",
        "TZ",
        "USER",
        "VIRTUAL_ENV",
    }
    | {
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "all_proxy",
        "ALL_PROXY",
    }
    | {"REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "DO_NOT_TRACK", "SAFETENSORS_FAST_GPU"}
)
_INHERITED_BEGINNINGS: Final = (
    *(
        "LC_",
        "LD_",
        "SSL_CERT_",
        "XDG_",
        "PYTHON",
        "HF_",
        "HUGGING_FACE_",
        "TRANSFORMERS_",
        "VLLM_",
        "TORCH",
        "PYTORCH_",
    ),
    *(
        "CUDA",
        "NVIDIA_",
        "NCCL_",
        "NVSHMEM_",
        "HIP_",
        "ROCM_",
        "ROCR_",
        "HSA_",
        "AITER_",
        "TRITON_",
        "FLASHINFER_",
    ),
    *(
        "OMP_",
        "KMP_",
        "MKL_",
        "OPENBLAS_",
        "GLOO_",
        "UCX_",
        "NIXL_",
        "LMCACHE_",
        "MOONCAKE_",
        "RAY_",
        "SLURM_",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Which part of which replica a process is, and what it listens on."""

    name: str  # of the replica
    role: Role
    host: str
    port: int
    start_rank: int = 0  # the first of its data-parallel ranks
    size_local: int = 1  # how many it has
    is_remote: bool = False  # on another machine than Headgate
    supervisor_port: int | None = None  # of vLLM's own, where it starts one server for each rank
    side_channel_port: int | None = None  # the first of one for each rank
    kv_events: str | None = None
    kv_replay: str | None = None


def arguments(spec: VllmConfig, model: Model, seat: Seat, cpu_cache_bytes: int = 0) -> tuple[str, ...]:
    """The whole command. `cpu_cache_bytes` is for an engine on the CPU."""
    head = (
        [*spec.command, spec.model] if spec.command[-1] == "serve" else [*spec.command, "--model", spec.model]
    )
    parts = (
        _identity(spec, seat),
        _always(spec),
        _parallel(spec, seat),
        _experts(spec),
        _memory(spec, cpu_cache_bytes),
        _cache(spec, seat),
        _batches(spec),
        _features(spec, model, seat),
    )
    family = model.preset.args if model.preset is not None else ()
    return (*head, *(word for part in parts for word in part), *family, *spec.extra_args)


def environment(spec: VllmConfig, seat: Seat, api_key: str, devices: tuple[str, ...]) -> dict[str, str]:
    """Over what is inherited. `devices` are uuids; none on the CPU."""
    found = {API_KEY_VARIABLE: api_key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if devices:
        found["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if spec.gpus == "none":
        # Pinned threads of several engines would all sit on the same cores; compiling at the first request wants a
        # C++ compiler and kills an engine that has none.
        found |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCHDYNAMO_DISABLE": "1"}
        if spec.gpus_per_replica == 1:
            found["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # two processes instead of three
    if seat.side_channel_port is not None:
        found |= {
            "VLLM_NIXL_SIDE_CHANNEL_HOST": seat.host,
            "VLLM_NIXL_SIDE_CHANNEL_PORT": str(seat.side_channel_port),
        }
        if spec.gpus == "none":
            found["UCX_TLS"] = "tcp,shm,self"
    if spec.sleep_mode:
        found["VLLM_SERVER_DEV_MODE"] = (
            "1"  # the routes of sleep and waking up are among the development ones
        )
    return found | {name: value.get_secret_value() for name, value in spec.env.items()}


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """What an engine gets of the environment that Headgate runs in. No provider's key is in it."""
    return {
        name: value
        for name, value in environ.items()
        if name in _INHERITED or name.startswith(_INHERITED_BEGINNINGS)
    }


def cpu_cache_bytes(spec: VllmConfig, memory_bytes: int) -> int:
    """The cache of each worker of an engine on the CPU."""
    if spec.kv_cache_memory_bytes is not None:
        return spec.kv_cache_memory_bytes
    least, most = _CPU_CACHE_BYTES
    share = memory_bytes // 16 // (spec.slots * spec.gpus_per_replica)
    return min(max(share // _MIB * _MIB, least), most)


def shutdown_timeout_s(spec: VllmConfig) -> int:
    """vLLM's own: from SIGTERM to aborting what still runs."""
    return math.ceil(spec.shutdown_timeout_s)


def _identity(spec: VllmConfig, seat: Seat) -> Iterator[str]:
    if seat.is_remote and spec.data_parallel.mode == "internal":
        yield "--headless"
    else:
        yield from ("--host", seat.host, "--port", str(seat.port), "--served-model-name", spec.served_name)
    yield from _option("--revision", spec.revision)
    yield from _option("--api-server-count", spec.api_servers)


def _always(spec: VllmConfig) -> Iterator[str]:
    yield "--enable-prompt-tokens-details"  # else no usage says what came from the cache
    yield "--enable-request-id-headers"
    yield "--disable-uvicorn-access-log"  # the gateway's log has a line for each request
    yield from ("--scheduling-policy", spec.scheduling_policy)
    yield from ("--shutdown-timeout", str(shutdown_timeout_s(spec)))  # vLLM's default aborts all at once
    yield from _option("--max-num-queued-reqs", spec.max_num_queued_reqs)
    yield from _option("--max-num-queued-tokens", spec.max_num_queued_tokens)
    if spec.per_request_metrics:
        yield "--enable-per-request-metrics"


def _parallel(spec: VllmConfig, seat: Seat) -> Iterator[str]:
    data = spec.data_parallel
    if spec.tensor_parallel_size > 1:
        yield from ("--tensor-parallel-size", str(spec.tensor_parallel_size))
    if spec.pipeline_parallel_size > 1:
        yield from ("--pipeline-parallel-size", str(spec.pipeline_parallel_size))
    yield from _option("--distributed-executor-backend", spec.distributed_executor_backend)
    if data.size == 1:
        return
    yield from ("--data-parallel-size", str(data.size))
    if data.backend == "ray":
        yield from ("--data-parallel-backend", data.backend)
        yield from _option("--data-parallel-size-local", data.here)
        yield from _option("--data-parallel-address", data.address)
    if data.mode == "external":
        if seat.size_local == 1:
            yield from ("--data-parallel-rank", str(seat.start_rank))
        else:
            yield from (
                "--data-parallel-multi-port-external-lb",
                "--data-parallel-size-local",
                str(seat.size_local),
            )
            yield from ("--data-parallel-supervisor-port", str(seat.supervisor_port))
            if seat.start_rank:
                yield from ("--data-parallel-start-rank", str(seat.start_rank))
    elif data.nodes:
        yield from ("--data-parallel-size-local", str(seat.size_local))
        if data.mode == "hybrid":
            yield "--data-parallel-hybrid-lb"
        if seat.start_rank:
            yield from ("--data-parallel-start-rank", str(seat.start_rank))
    if data.nodes:
        yield from ("--data-parallel-address", str(data.address))
        yield from ("--data-parallel-rpc-port", str(data.rpc_port or _RPC_PORT))


def _experts(spec: VllmConfig) -> Iterator[str]:
    expert = spec.expert_parallel
    if expert is None:
        return
    yield "--enable-expert-parallel"
    yield from _option("--all2all-backend", expert.all2all_backend)
    if expert.eplb is not None:
        yield from ("--enable-eplb", "--eplb-config", _json(expert.eplb.model_dump()))
    if expert.dual_batch_overlap:
        yield "--enable-dbo"


def _memory(spec: VllmConfig, cache_bytes: int) -> Iterator[str]:
    share, cache = spec.gpu_memory_utilization, spec.kv_cache_memory_bytes
    if spec.gpus == "none":
        share, cache = share or _CPU_MEMORY_SHARE, cache_bytes
    yield from _option("--gpu-memory-utilization", share)
    yield from _option("--kv-cache-memory-bytes", cache)
    yield from _option("--kv-cache-dtype", spec.kv_cache_dtype)
    yield from _option("--dtype", spec.dtype)
    yield from _option("--quantization", spec.quantization)
    if spec.enforce_eager or (spec.enforce_eager is None and spec.gpus == "none"):
        yield "--enforce-eager"
    if spec.kv_offload is not None:
        yield from ("--kv-offloading-size", f"{spec.kv_offload.size_gib:g}")
        yield from ("--kv-offloading-backend", spec.kv_offload.backend)


def _cache(spec: VllmConfig, seat: Seat) -> Iterator[str]:
    caching = spec.prefix_caching
    if caching.enabled is not None:
        yield "--enable-prefix-caching" if caching.enabled else "--no-enable-prefix-caching"
    if caching.enabled is not False:
        yield from ("--prefix-caching-hash-algo", caching.hash_algorithm)
    yield from _option("--block-size", caching.block_size)
    if seat.kv_events is not None:
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "topic": f"kv@{seat.name}@{spec.served_name}",
        }
        yield from (
            "--kv-events-config",
            _json(events | {"endpoint": seat.kv_events, "replay_endpoint": seat.kv_replay}),
        )


def _batches(spec: VllmConfig) -> Iterator[str]:
    longest = "auto" if spec.max_model_len is None and spec.gpus == "none" else spec.max_model_len
    yield from _option("--max-model-len", longest)
    yield from _option("--max-num-seqs", spec.max_num_seqs)
    yield from _option("--max-num-batched-tokens", spec.max_num_batched_tokens)
    if spec.chunked_prefill is not None:
        yield "--enable-chunked-prefill" if spec.chunked_prefill else "--no-enable-chunked-prefill"


def _features(spec: VllmConfig, model: Model, seat: Seat) -> Iterator[str]:
    preset = model.preset
    if spec.runner != "auto":
        yield from ("--runner", spec.runner)
    tools = spec.tool_parser or (preset.tool_parser if preset else None)
    if tools is not None and tools != NONE:
        yield from ("--enable-auto-tool-choice", "--tool-call-parser", tools)
    reasoning = spec.reasoning_parser or (preset.reasoning_parser if preset else None)
    if reasoning is not None and reasoning != NONE:
        yield from ("--reasoning-parser", reasoning)
    yield from _option("--chat-template", spec.chat_template)
    trusts = spec.trust_remote_code
    if trusts or (trusts is None and preset is not None and preset.trust_remote_code):
        yield "--trust-remote-code"
    if spec.speculative is not None:
        yield from ("--speculative-config", _json(_speculation(spec)))
    if spec.lora is not None:
        yield from _lora(spec)
    if spec.sleep_mode:
        yield "--enable-sleep-mode"
    if spec.roles is not None:
        yield from ("--kv-transfer-config", _json(_transfer(spec, seat)))


def _speculation(spec: VllmConfig) -> dict[str, Any]:
    assert spec.speculative is not None
    found = spec.speculative.model_dump(exclude={"options"}, exclude_none=True)
    return {**found, **spec.speculative.options}


def _lora(spec: VllmConfig) -> Iterator[str]:
    lora = spec.lora
    assert lora is not None
    yield from ("--enable-lora", "--max-lora-rank", str(lora.max_rank), "--max-loras", str(lora.max_loras))
    yield from _option("--max-cpu-loras", lora.max_cpu_loras)
    yield from (
        "--lora-modules",
        *(_json({"name": name, "path": path}) for name, path in lora.adapters.items()),
    )


def _transfer(spec: VllmConfig, seat: Seat) -> dict[str, Any]:
    """Both roles may send and receive: which does what is said by the gateway's two calls."""
    roles = spec.roles
    assert roles is not None
    found: dict[str, Any] = {"kv_connector": roles.connector, "kv_role": "kv_both"}
    if seat.role == "decode":
        found["kv_load_failure_policy"] = roles.load_failure
    if spec.gpus == "none":
        found["kv_buffer_device"] = "cpu"
    return {**found, **roles.options}


def _option(flag: str, value: object) -> Iterator[str]:
    if value is not None:
        yield from (flag, f"{value:g}" if isinstance(value, float) else str(value))


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"), sort_keys=True)
