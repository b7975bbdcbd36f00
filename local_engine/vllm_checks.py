"""Combinations of a vLLM pool's settings that cannot work, each with what to change.

Owns what can be told from the specification and what is known of its model, before a GPU is looked for or a process
started. Refuses to guess: what depends on a model nobody knows is left to vLLM. A problem's path is within the `vllm`
block.
"""

import ipaddress
from collections.abc import Iterator
from typing import NamedTuple

from local_engine.presets import NONE, Model, presets
from local_engine.vllm_config import VllmConfig

_NEED_MODEL = frozenset({"draft_model", "eagle", "eagle3", "medusa", "mlp_speculator", "dspark"})


class SpecProblem(NamedTuple):
    """What is wrong, in a sentence that says what to change."""

    path: tuple[str, ...]
    message: str


def preset_problem(spec: VllmConfig) -> SpecProblem | None:
    """To be asked first: without a preset there is no model to check against."""
    if spec.preset is None or spec.preset == NONE or spec.preset in presets():
        return None
    return SpecProblem(
        ("preset",),
        f'there is no preset "{spec.preset}"; `headgate engine presets` lists them, and {NONE} assumes nothing',
    )


def spec_problems(spec: VllmConfig, model: Model) -> Iterator[SpecProblem]:
    """All that is wrong with `spec`, given what is known of its model."""
    is_moe = model.is_moe if spec.mixture_of_experts is None else spec.mixture_of_experts
    yield from _gpu_problems(spec)
    yield from _cpu_problems(spec)
    yield from _parallel_problems(spec, model, is_moe=is_moe)
    yield from _expert_problems(spec, model, is_moe=is_moe)
    yield from _scheduling_problems(spec)
    yield from _scale_problems(spec)
    yield from _feature_problems(spec, model)
    yield from _address_problems(spec)


def _gpu_problems(spec: VllmConfig) -> Iterator[SpecProblem]:
    if spec.distributed_executor_backend == "ray" and spec.gpus != "auto":
        yield SpecProblem(
            ("gpus",), "Ray gives out the GPUs (distributed_executor_backend: ray): leave it out"
        )
        return
    if not isinstance(spec.gpus, tuple):
        return
    needed = spec.slots * spec.gpus_per_replica
    if len(spec.gpus) < needed:
        yield SpecProblem(
            ("gpus",),
            f"there are {len(spec.gpus)}, and {needed} are needed: {_product(spec)}. List more, or lower one of these",
        )
    if spec.gpus_per_replica > 1 and any(str(gpu).startswith("MIG-") for gpu in spec.gpus):
        yield SpecProblem(
            ("gpus",),
            "a MIG slice cannot work together with another: give each replica one slice, with tensor_parallel_size, "
            "pipeline_parallel_size and data_parallel.size at 1",
        )


def _product(spec: VllmConfig) -> str:
    """The factors of the GPUs needed, as an operator counts them."""
    factors = [(spec.slots, "replicas"), (spec.tensor_parallel_size, "tensor")]
    factors += [
        (spec.pipeline_parallel_size, "pipeline"),
        (spec.data_parallel.size_local, "data-parallel ranks here"),
    ]
    return " x ".join(f"{number} {what}" for number, what in factors if number > 1 or what == "replicas")


def _cpu_problems(spec: VllmConfig) -> Iterator[SpecProblem]:
    if spec.gpus != "none":
        return
    if spec.sleep_mode:
        yield SpecProblem(("sleep_mode",), "vLLM cannot sleep on the CPU (gpus: none); leave it out")
    if spec.pipeline_parallel_size > 1:
        yield SpecProblem(
            ("pipeline_parallel_size",), "does not work on the CPU (gpus: none); use tensor_parallel_size"
        )
    if spec.expert_parallel is not None and spec.expert_parallel.eplb is not None:
        yield SpecProblem(("expert_parallel", "eplb"), "needs GPUs (here gpus: none); leave it out")


def _parallel_problems(spec: VllmConfig, model: Model, *, is_moe: bool | None) -> Iterator[SpecProblem]:
    data, heads = spec.data_parallel, model.size.heads
    if heads and heads % spec.tensor_parallel_size:
        yield SpecProblem(
            ("tensor_parallel_size",),
            f"must divide the model's {heads} attention heads: {', '.join(map(str, _divisors(heads)))}",
        )
    if data.mode != "internal" and data.size == 1:
        yield SpecProblem(
            ("data_parallel", "mode"),
            f"{data.mode} is for several ranks: raise data_parallel.size, or leave mode out",
        )
    elif data.mode == "external" and is_moe is False:
        yield SpecProblem(
            ("data_parallel", "mode"),
            f"external is for mixtures of experts only; a dense model has replicas instead: replicas: "
            f"{spec.replicas * data.size} without data_parallel",
        )
    elif data.mode == "hybrid" and not data.nodes:
        yield SpecProblem(
            ("data_parallel", "mode"),
            "hybrid is for several machines: list the others in nodes, or use internal",
        )
    elif data.mode == "hybrid" and min(data.size_local, *(node.size_local for node in data.nodes)) == 1:
        yield SpecProblem(
            ("data_parallel", "mode"),
            "hybrid needs two ranks or more on every machine; with one, use external",
        )
    if data.nodes and spec.slots > 1:
        yield SpecProblem(
            ("replicas",), "with data_parallel.nodes there is one replica; write a pool for each further one"
        )


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _expert_problems(spec: VllmConfig, model: Model, *, is_moe: bool | None) -> Iterator[SpecProblem]:
    expert = spec.expert_parallel
    if expert is None:
        return
    ranks = spec.tensor_parallel_size * spec.data_parallel.size
    if is_moe is False:
        yield SpecProblem(
            ("expert_parallel",),
            "the model is not a mixture of experts; leave it out (or, if it is one, set mixture_of_experts: true)",
        )
    elif ranks == 1:
        yield SpecProblem(
            ("expert_parallel",),
            "there is one rank to spread experts over: raise tensor_parallel_size or data_parallel.size",
        )
    if expert.dual_batch_overlap and spec.data_parallel.size == 1:
        yield SpecProblem(("expert_parallel", "dual_batch_overlap"), "needs data_parallel.size of 2 or more")
    if expert.all2all_backend is not None and spec.data_parallel.size == 1:
        yield SpecProblem(
            ("expert_parallel", "all2all_backend"),
            "is used between data-parallel ranks only: raise data_parallel.size, or leave it out",
        )
    if expert.eplb is not None and model.size.experts:
        copies = model.size.experts + expert.eplb.num_redundant_experts
        if copies % ranks:
            yield SpecProblem(
                ("expert_parallel", "eplb", "num_redundant_experts"),
                f"{model.size.experts} experts and {expert.eplb.num_redundant_experts} copies do not divide among {ranks} "
                f"ranks: set {-model.size.experts % ranks} or that plus a multiple of {ranks}",
            )


def _scheduling_problems(spec: VllmConfig) -> Iterator[SpecProblem]:
    batched = spec.max_num_batched_tokens
    if batched is not None and spec.max_num_seqs is not None and batched < spec.max_num_seqs:
        yield SpecProblem(
            ("max_num_batched_tokens",),
            f"must be at least max_num_seqs ({spec.max_num_seqs}): each computes a token a step",
        )
    longest = spec.max_model_len if isinstance(spec.max_model_len, int) else 0
    if spec.chunked_prefill is False and batched is not None and batched < longest:
        yield SpecProblem(
            ("max_num_batched_tokens",),
            f"must hold a whole prompt (max_model_len {longest}) when chunked_prefill is false",
        )


def _scale_problems(spec: VllmConfig) -> Iterator[SpecProblem]:
    scale, roles = spec.scale, spec.roles
    if scale is None:
        return
    if scale.zero == "sleep" and not spec.sleep_mode:
        yield SpecProblem(("scale", "zero"), "sleep needs sleep_mode: true; without it, engines stop")
    if scale.max < spec.slots:
        said = "replicas" if roles is None else "roles"
        yield SpecProblem(
            ("scale", "max"),
            f"is less than the {spec.slots} of {said}: raise it to {spec.slots} or more, or lower those",
        )
    fewest = min([scale.min, *(entry.min for entry in scale.schedule if entry.min is not None)])
    if roles is not None and fewest <= roles.prefill:
        yield SpecProblem(
            ("scale", "min"),
            f"with roles, the first {roles.prefill} only compute prompts, and somebody must answer: {roles.prefill + 1} or "
            "more, at any time",
        )


def _feature_problems(spec: VllmConfig, model: Model) -> Iterator[SpecProblem]:
    if spec.roles is not None and spec.replicas > 1:
        yield SpecProblem(
            ("replicas",), "with roles, roles.prefill and roles.decode say how many; leave it out"
        )
    if spec.roles is not None and spec.kv_offload is not None:
        yield SpecProblem(
            ("kv_offload",), "vLLM has one KV connector, which roles use; choose one of the two"
        )
    speculative = spec.speculative
    if speculative is not None and speculative.method in _NEED_MODEL and speculative.model is None:
        yield SpecProblem(
            ("speculative", "model"), f"is needed: {speculative.method} guesses with a model of its own"
        )
    if _runner(spec, model) == "pooling":
        for name in ("speculative", "roles"):
            if getattr(spec, name) is not None:
                yield SpecProblem((name,), "is for models that generate; this one embeds")
    if spec.lora is not None and spec.served_name in spec.lora.adapters:
        yield SpecProblem(
            ("lora", "adapters", spec.served_name), "is the model's own name; give the adapter another"
        )


def _runner(spec: VllmConfig, model: Model) -> str:
    return model.runner if spec.runner == "auto" else spec.runner


def _address_problems(spec: VllmConfig) -> Iterator[SpecProblem]:
    try:
        address = ipaddress.ip_address(spec.host)
    except ValueError:
        return  # a name: whom it stands for is not known here
    if address.is_unspecified or not (address.is_private or address.is_loopback):
        yield SpecProblem(
            ("host",),
            "must be loopback or a private address: an engine shows its metrics and more to everybody who reaches it",
        )
