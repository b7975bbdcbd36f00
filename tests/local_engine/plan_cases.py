"""Specifications of vLLM pools, one for each thing that can be said, and their plans as text.

`python -m tests.local_engine.plan_cases` writes the plans again, to be read before they are committed.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from local_engine.gpus import Gpu, Machine
from local_engine.plan import PoolPlan, RemotePart, ReplicaPlan, Site
from local_engine.planning import plan_pool
from local_engine.presets import presets
from local_engine.vllm_config import VllmConfig

GIB = 1 << 30
FOLDER = Path(__file__).with_name("plans")
MACHINE = Machine(tuple(Gpu(n, f"GPU-{n:08x}", "H100", 80 * GIB) for n in range(8)), 64, 1024 * GIB)
SLICED = Machine(
    tuple(Gpu(0, f"MIG-{n:08x}", "H100 MIG 3g.40gb", 40 * GIB) for n in range(2)), 64, 1024 * GIB
)
QWEN, MOE = "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B"

CASES: dict[str, dict[str, Any]] = {
    "one": {"model": QWEN},
    "replicas": {"model": QWEN, "replicas": 2, "max_model_len": 32768},
    "named-gpus": {"model": QWEN, "replicas": 2, "gpus": [3, "GPU-00000005"]},
    "mig-slices": {"model": QWEN, "replicas": 2, "gpus": ["MIG-00000001", "MIG-00000000"]},
    "tensor": {"model": "Qwen/Qwen3-32B", "replicas": 2, "tensor_parallel_size": 4},
    "pipeline": {
        "model": "meta-llama/Llama-3.1-405B",
        "tensor_parallel_size": 4,
        "pipeline_parallel_size": 2,
    },
    "ranks-internal": {"model": QWEN, "data_parallel": {"size": 4}, "api_servers": 2},
    "ranks-external": {"model": MOE, "data_parallel": {"size": 2, "mode": "external"}},
    "ranks-hybrid": {
        "model": MOE,
        "port": 8100,
        "host": "10.0.0.5",
        "data_parallel": {
            "size": 8,
            "mode": "hybrid",
            "address": "10.0.0.5",
            "rpc_port": 13345,
            "nodes": [{"address": "10.0.0.6", "size_local": 4}],
        },
    },
    "ranks-external-nodes": {
        "model": "deepseek-ai/DeepSeek-V3.1",
        "port": 8100,
        "host": "10.0.0.5",
        "data_parallel": {
            "size": 16,
            "mode": "external",
            "address": "10.0.0.5",
            "nodes": [{"address": "10.0.0.6", "size_local": 8}],
        },
        "expert_parallel": {"all2all_backend": "deepep_low_latency"},
    },
    "ranks-headless": {
        "model": "deepseek-ai/DeepSeek-R1",
        "data_parallel": {
            "size": 16,
            "address": "10.0.0.5",
            "nodes": [{"address": "10.0.0.6", "size_local": 8}],
        },
        "expert_parallel": {},
    },
    "one-rank-each": {
        "model": MOE,
        "port": 8100,
        "tensor_parallel_size": 8,
        "data_parallel": {
            "size": 2,
            "mode": "external",
            "address": "10.0.0.5",
            "nodes": [{"address": "10.0.0.6", "size_local": 1}],
        },
    },
    "ranks-ray": {"model": MOE, "data_parallel": {"size": 2, "backend": "ray"}},
    "ranks-ray-elsewhere": {
        "model": MOE,
        "data_parallel": {"size": 4, "backend": "ray", "here": 2, "address": "10.0.0.5"},
    },
    "workers-ray": {
        "model": "moonshotai/Kimi-K2-Instruct",
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 2,
        "distributed_executor_backend": "ray",
    },
    "experts-tensor": {"model": MOE, "tensor_parallel_size": 2, "expert_parallel": {}},
    "experts-wide": {
        "model": "moonshotai/Kimi-K2-Instruct",
        "data_parallel": {"size": 8},
        "expert_parallel": {
            "all2all_backend": "deepep_high_throughput",
            "eplb": {"window_size": 500, "step_interval": 1500, "num_redundant_experts": 8},
            "dual_batch_overlap": True,
        },
    },
    "no-prefix-caching": {"model": QWEN, "prefix_caching": {"enabled": False}},
    "prefix-caching": {
        "model": QWEN,
        "prefix_caching": {"enabled": True, "hash_algorithm": "xxhash_cbor", "block_size": 64},
    },
    "no-events": {"model": QWEN, "kv_events": False},
    "offload": {"model": QWEN, "kv_offload": {"size_gib": 64}},
    "offload-lmcache": {"model": QWEN, "kv_offload": {"size_gib": 0.5, "backend": "lmcache"}},
    "memory": {
        "model": QWEN,
        "gpu_memory_utilization": 0.5,
        "kv_cache_dtype": "fp8",
        "kv_cache_memory_bytes": 8 * GIB,
        "dtype": "bfloat16",
        "quantization": "fp8",
        "enforce_eager": True,
    },
    "batches": {
        "model": QWEN,
        "max_model_len": 16384,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 16384,
        "max_num_queued_reqs": 64,
        "max_num_queued_tokens": 1_000_000,
        "chunked_prefill": False,
        "scheduling_policy": "fcfs",
    },
    "chunked": {"model": QWEN, "chunked_prefill": True, "max_num_queued_reqs": None},
    "ngram": {
        "model": QWEN,
        "speculative": {"method": "ngram", "num_speculative_tokens": 4, "options": {"prompt_lookup_max": 4}},
    },
    "eagle": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "speculative": {
            "method": "eagle3",
            "model": "RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3",
            "num_speculative_tokens": 3,
        },
    },
    "mtp": {
        "model": "zai-org/GLM-4.7-FP8",
        "tensor_parallel_size": 8,
        "speculative": {"method": "mtp", "num_speculative_tokens": 1},
    },
    "adapters": {
        "model": "meta-llama/Llama-3.1-8B-Instruct",
        "name": "llama",
        "lora": {
            "adapters": {"support": "/models/support", "legal": "org/legal-lora"},
            "max_rank": 32,
            "max_loras": 2,
            "max_cpu_loras": 4,
        },
    },
    "sleep": {"model": QWEN, "sleep_mode": True},
    "roles": {"model": QWEN, "roles": {"prefill": 1, "decode": 2}},
    "roles-mooncake": {
        "model": MOE,
        "roles": {
            "connector": "MooncakeConnector",
            "load_failure": "fail",
            "options": {"kv_buffer_device": "cuda"},
        },
        "data_parallel": {"size": 2},
    },
    "cpu": {"model": "Qwen/Qwen3-0.6B", "gpus": "none", "replicas": 2, "max_model_len": 4096},
    "cpu-tensor": {
        "model": "Qwen/Qwen3-0.6B",
        "gpus": "none",
        "tensor_parallel_size": 2,
        "kv_cache_memory_bytes": 64 << 20,
        "enforce_eager": False,
    },
    "cpu-roles": {"model": "Qwen/Qwen3-0.6B", "gpus": "none", "roles": {}},
    "embeddings": {"model": "BAAI/bge-m3"},
    "embeddings-said": {"model": "org/of-our-own", "runner": "pooling"},
    "parsers-said": {
        "model": QWEN,
        "tool_parser": "qwen3_xml",
        "reasoning_parser": "none",
        "preset": "qwen3",
    },
    "no-preset": {
        "model": QWEN,
        "preset": "none",
        "trust_remote_code": True,
        "chat_template": "{{ messages }}",
    },
    "unknown": {"model": "org/of-our-own", "per_request_metrics": True, "revision": "v2"},
    "verbatim": {
        "model": QWEN,
        "host": "fd00::5",
        "command": ["/opt/vllm/bin/python", "-m", "vllm.entrypoints.launchers.api_server.entry"],
        "extra_args": ["--seed", "7", "--max-logprobs=5"],
        "env": {"HF_TOKEN": "hf-secret", "NCCL_DEBUG": "INFO"},
        "start_timeout_s": 60,
        "drain_timeout_s": 5,
        "shutdown_timeout_s": 2.5,
    },
    "does-not-fit": {"model": "Qwen/Qwen3-235B-A22B"},
    "too-little-cache": {"model": "Qwen/Qwen3-32B", "max_model_len": 131072},
}
# One model of each preset, so that all of their parsers and flags are tried.
MODELS: dict[str, str] = {
    "kimi-k2": "moonshotai/Kimi-K2-Instruct",
    "kimi-k2-thinking": "moonshotai/Kimi-K2-Thinking",
    "kimi-k2.5": "moonshotai/Kimi-K2.5",
    "kimi-k3": "moonshotai/Kimi-K3",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3-0324",
    "deepseek-r1": "deepseek-ai/DeepSeek-R1-0528",
    "deepseek-r1-distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    "deepseek-v3.1": "deepseek-ai/DeepSeek-V3.1",
    "deepseek-v3.2": "deepseek-ai/DeepSeek-V3.2",
    "deepseek-v4": "deepseek-ai/DeepSeek-V4-Flash",
    "qwen3": "Qwen/Qwen3-8B",
    "qwen3-instruct": "Qwen/Qwen3-4B-Instruct-2507",
    "qwen3-moe": "Qwen/Qwen3-30B-A3B-Thinking-2507",
    "qwen3-moe-instruct": "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8",
    "qwen3-coder": "Qwen/Qwen3-Coder-480B-A35B-Instruct",
    "qwen3-next": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3.5": "Qwen/Qwen3.5-27B",
    "qwen3.5-moe": "Qwen/Qwen3.6-35B-A3B",
    "qwen2.5": "Qwen/Qwen2.5-72B-Instruct-AWQ",
    "qwq": "Qwen/QwQ-32B",
    "qwen3-embedding": "Qwen/Qwen3-Embedding-0.6B",
    "gpt-oss": "openai/gpt-oss-120b",
    "llama3": "meta-llama/Llama-3.3-70B-Instruct",
    "llama4": "meta-llama/Llama-4-Scout-17B-16E-Instruct",
    "glm-4.5": "zai-org/GLM-4.5-Air",
    "glm-4.7": "zai-org/GLM-4.7-FP8",
    "glm-5": "zai-org/GLM-5-FP8",
    "mistral": "mistralai/Mistral-Small-3.2-24B-Instruct-2506",
    "magistral": "mistralai/Magistral-Small-2509",
    "mistral-small-4": "mistralai/Mistral-Small-4-119B-2603",
    "mistral-large-3": "mistralai/Mistral-Large-3-675B-Instruct-2512",
    "mixtral": "mistralai/Mixtral-8x7B-Instruct-v0.1",
    "minimax-m2": "MiniMaxAI/MiniMax-M2",
    "gemma-4": "google/gemma-4-31B-it",
    "gemma-4-moe": "google/gemma-4-26B-A4B-it",
    "hermes": "NousResearch/Hermes-3-Llama-3.1-8B",
    "embeddings": "sentence-transformers/all-MiniLM-L6-v2",
}


class CountedPorts:
    """18000, then what follows."""

    def __init__(self) -> None:
        self._next = 18000

    def take(self, owner: str, count: int, host: str) -> int:
        first, self._next = self._next, self._next + count
        return first


def site(machine: Machine = MACHINE) -> Site:
    return Site(machine, CountedPorts(), Path("/run/headgate"), "the-key-of-this-start")


def plan(name: str) -> PoolPlan:
    spec = VllmConfig.model_validate(CASES[name])
    return plan_pool("pool", spec, site(SLICED if name.startswith("mig") else MACHINE))


def preset_plans() -> Iterator[tuple[str, PoolPlan]]:
    """Each preset's model on as many GPUs as there are."""
    for name in presets():
        spec = VllmConfig(model=MODELS[name])
        yield name, plan_pool("pool", spec, replace(site()))


def text(plan: PoolPlan) -> str:
    """Everything in it, secrets as placeholders."""
    lines = [f"models {' '.join(plan.models)}", *(f"note {note}" for note in plan.notes)]
    for replica in plan.replicas:
        lines += ["", *_replica(replica)]
    for part in plan.remote:
        lines += ["", *_remote(part)]
    return "\n".join([*lines, ""])


def _replica(plan: ReplicaPlan) -> Iterator[str]:
    yield f"{plan.name} {plan.role} on {' '.join(gpu.uuid for gpu in plan.gpus) or 'the CPU'}"
    yield f"  ports {' '.join(map(str, plan.ports))} side channel {plan.side_channel_port}"
    yield f"  {plan.memory}, {plan.memory.kv_tokens} tokens"
    yield f"  start {plan.start_timeout_s:g} s, drain {plan.drain_timeout_s:g} s, stop {plan.stop_timeout_s:g} s"
    yield f"  probe {plan.probe_model}{' (embeds)' if plan.probes_embedding else ''}{' (sleeps)' if plan.can_sleep else ''}"
    yield from (f"  {endpoint}" for endpoint in plan.endpoints)
    yield from (f"  socket {path}" for path in plan.sockets)
    yield from (f"  {name}={value}" for name, value in plan.shown_env().items())
    yield from _words(plan.argv)


def _remote(part: RemotePart) -> Iterator[str]:
    yield f"{part.replica} on {part.node}"
    yield from (f"  {endpoint}" for endpoint in part.endpoints)
    yield from (f"  {name}={value}" for name, value in part.shown_env().items())
    yield from _words(part.argv)


def _words(argv: tuple[str, ...]) -> Iterator[str]:
    """A flag and its values on a line."""
    line = ""
    for word in argv:
        if word.startswith("--"):
            yield f"    {line}"
            line = word
        else:
            line += f" {word}" if line else word
    yield f"    {line}"


if __name__ == "__main__":
    for name in CASES:
        (FOLDER / f"{name}.txt").write_text(text(plan(name)))
