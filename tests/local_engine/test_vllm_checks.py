import json

import pytest
from pydantic import ValidationError

from local_engine.planning import model_of
from local_engine.vllm_checks import preset_problem, spec_problems
from local_engine.vllm_config import VllmConfig
from tests.local_engine.plan_cases import CASES, MODELS

DENSE, MOE = "Qwen/Qwen3-8B", "Qwen/Qwen3-30B-A3B"
TWO_NODES = {"address": "10.0.0.5", "nodes": [{"address": "10.0.0.6", "size_local": 2}]}


def said(**settings) -> dict[str, str]:
    """The problems by their path."""
    spec = VllmConfig.model_validate({"model": DENSE, **settings})
    return {".".join(path): message for path, message in spec_problems(spec, model_of(spec))}


# What is wrong, where, and words of the advice.
REFUSED = [
    ({"gpus": [0], "tensor_parallel_size": 2}, "gpus", "2 are needed: 1 replicas x 2 tensor. List more"),
    (
        {"gpus": [0, 1, 2], "replicas": 2, "tensor_parallel_size": 2},
        "gpus",
        "4 are needed: 2 replicas x 2 tensor",
    ),
    ({"gpus": [0, 1], "data_parallel": {"size": 4}}, "gpus", "1 replicas x 4 data-parallel ranks here"),
    ({"gpus": ["MIG-aaaa", "MIG-bbbb"], "tensor_parallel_size": 2}, "gpus", "give each replica one slice"),
    ({"gpus": "none", "sleep_mode": True}, "sleep_mode", "leave it out"),
    ({"gpus": "none", "pipeline_parallel_size": 2}, "pipeline_parallel_size", "use tensor_parallel_size"),
    (
        {"model": MOE, "gpus": "none", "tensor_parallel_size": 2, "expert_parallel": {"eplb": {}}},
        "expert_parallel.eplb",
        "needs GPUs",
    ),
    ({"gpus": [0, 1], "distributed_executor_backend": "ray"}, "gpus", "leave it out"),
    ({"tensor_parallel_size": 3}, "tensor_parallel_size", "32 attention heads: 1, 2, 4, 8, 16, 32"),
    ({"data_parallel": {"mode": "external"}}, "data_parallel.mode", "raise data_parallel.size"),
    ({"data_parallel": {"size": 4, "mode": "external"}, "replicas": 2}, "data_parallel.mode", "replicas: 8"),
    ({"model": MOE, "data_parallel": {"size": 4, "mode": "hybrid"}}, "data_parallel.mode", "use internal"),
    (
        {"model": MOE, "data_parallel": {"size": 3, "mode": "hybrid", **TWO_NODES}},
        "data_parallel.mode",
        "with one, use external",
    ),
    (
        {"model": MOE, "replicas": 2, "data_parallel": {"size": 4, **TWO_NODES}},
        "replicas",
        "write a pool for each",
    ),
    ({"tensor_parallel_size": 2, "expert_parallel": {}}, "expert_parallel", "set mixture_of_experts: true"),
    (
        {"model": MOE, "expert_parallel": {}},
        "expert_parallel",
        "raise tensor_parallel_size or data_parallel.size",
    ),
    (
        {"model": MOE, "tensor_parallel_size": 2, "expert_parallel": {"dual_batch_overlap": True}},
        "expert_parallel.dual_batch_overlap",
        "data_parallel.size of 2",
    ),
    (
        {"model": MOE, "tensor_parallel_size": 2, "expert_parallel": {"all2all_backend": "deepep_v2"}},
        "expert_parallel.all2all_backend",
        "raise data_parallel.size",
    ),
    (
        {
            "model": MOE,
            "data_parallel": {"size": 6},
            "expert_parallel": {"eplb": {"num_redundant_experts": 1}},
        },
        "expert_parallel.eplb.num_redundant_experts",
        "set 4 or that plus a multiple of 6",
    ),
    ({"max_num_batched_tokens": 64, "max_num_seqs": 128}, "max_num_batched_tokens", "at least max_num_seqs"),
    (
        {"max_num_batched_tokens": 2048, "max_model_len": 4096, "chunked_prefill": False},
        "max_num_batched_tokens",
        "must hold a whole prompt (max_model_len 4096)",
    ),
    ({"scale": {"min": 0, "max": 2, "zero": "sleep"}}, "scale.zero", "needs sleep_mode: true"),
    ({"replicas": 3, "scale": {"max": 2}}, "scale.max", "raise it to 3 or more"),
    ({"roles": {"prefill": 2}, "scale": {"min": 2, "max": 4}}, "scale.min", "3 or more"),
    (
        {
            "roles": {},
            "scale": {"min": 2, "max": 4, "schedule": [{"start": "20:00", "end": "06:00", "min": 1}]},
        },
        "scale.min",
        "2 or more, at any time",
    ),
    ({"roles": {}, "replicas": 2}, "replicas", "roles.prefill and roles.decode"),
    ({"roles": {}, "kv_offload": {"size_gib": 1}}, "kv_offload", "choose one of the two"),
    ({"speculative": {"method": "eagle3", "num_speculative_tokens": 3}}, "speculative.model", "is needed"),
    (
        {"model": "BAAI/bge-m3", "speculative": {"method": "ngram", "num_speculative_tokens": 3}},
        "speculative",
        "this one embeds",
    ),
    ({"lora": {"adapters": {DENSE: "/lora"}}}, f"lora.adapters.{DENSE}", "give the adapter another"),
    ({"host": "0.0.0.0"}, "host", "loopback or a private address"),
    ({"host": "::"}, "host", "loopback or a private address"),
    ({"host": "8.8.8.8"}, "host", "loopback or a private address"),
]


@pytest.mark.parametrize(("settings", "path", "advice"), REFUSED, ids=lambda value: json.dumps(value)[:60])
def test_what_cannot_work_is_refused_with_what_to_change(settings, path, advice):
    found = said(**settings)
    assert path in found, found
    assert advice in found[path]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"env": {"VLLM_API_KEY": "k"}}, "is the pool's api_key"),
        ({"env": {"CUDA_VISIBLE_DEVICES": "1"}}, "gpus says which"),
        ({"data_parallel": {"size": 4, "here": 2}}, "here: is for backend: ray"),
        ({"data_parallel": {"size": 4, "backend": "ray", "here": 5}}, "at most size"),
        ({"data_parallel": {"backend": "ray"}}, "distributed_executor_backend: ray"),
        ({"data_parallel": {"size": 4, "backend": "ray", **TWO_NODES}}, "Ray knows its machines itself"),
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_what_contradicts_itself_is_refused_with_what_to_say_instead(settings, advice):
    with pytest.raises(ValidationError, match=advice):
        VllmConfig.model_validate({"model": DENSE, **settings})


@pytest.mark.parametrize("name", CASES)
def test_what_is_planned_is_not_refused(name):
    assert said(**CASES[name]) == {}


def test_a_model_that_nobody_knows_is_left_to_vllm():
    settings = {
        "tensor_parallel_size": 3,
        "expert_parallel": {},
        "data_parallel": {"size": 2, "mode": "external"},
    }
    assert said(model="org/of-our-own", **settings) == {}


def test_the_operators_word_of_what_a_model_is_wins():
    expert = {"tensor_parallel_size": 2, "expert_parallel": {}}
    assert said(mixture_of_experts=True, **expert) == {}
    assert "expert_parallel" in said(model=MOE, mixture_of_experts=False, **expert)


def test_a_preset_that_there_is_not_is_refused():
    assert preset_problem(VllmConfig(model=DENSE, preset="qwen33")) is not None
    assert all(preset_problem(VllmConfig(model=DENSE, preset=name)) is None for name in (*MODELS, "none"))
