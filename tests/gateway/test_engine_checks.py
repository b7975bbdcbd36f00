import pytest

from gateway.config import load
from gateway.config_file import ConfigError


def refusal(directory, pools: str) -> list[str]:
    path = directory / "config.yaml"
    path.write_text(f"pools:\n{pools}\n")
    with pytest.raises(ConfigError) as caught:
        load(path, {})
    return list(caught.value.lines)


@pytest.mark.parametrize(
    ("pools", "line"),
    [
        (
            "  a: {vllm: {model: Qwen/Qwen3-8B, gpus: [0], tensor_parallel_size: 2}}",
            "config.yaml:2: pools.a.vllm.gpus: there are 1, and 2 are needed",
        ),
        (
            "  a: {vllm: {model: Qwen/Qwen3-8B, preset: qwen33}}",
            'config.yaml:2: pools.a.vllm.preset: there is no preset "qwen33"',
        ),
        (
            "  a: {vllm: {model: m, port: 8079, replicas: 3}}",
            "config.yaml:2: pools.a.vllm.port: 8080 is also server.port: engines have 8079 to 8081",
        ),
        (
            "  a: {vllm: {model: m, port: 9000, replicas: 3}}\n  b: {vllm: {model: m, port: 9002}}",
            "config.yaml:3: pools.b.vllm.port: its engines have 9002 to 9002, and those of a 9000 to 9002: set it to 9003",
        ),
        (
            "  a: {vllm: {model: m, port: 65535, replicas: 2}}",
            "config.yaml:2: pools.a.vllm.port: its engines need 2 ports, and those end at 65535",
        ),
        (
            "  a: {vllm: {model: m, gpus: [0, 1]}}\n  b: {vllm: {model: m, gpus: [1]}}",
            "config.yaml:3: pools.b.vllm.gpus: 1 is also the pool a's",
        ),
        (
            "  a: {vllm: {model: m, data_parallel: {size: 4, mode: hybrid, address: h, nodes: [{address: n, size_local: 2}]}}}",
            "config.yaml:2: pools.a.api_key: is needed with data_parallel.nodes",
        ),
        (
            "  a: {vllm: {model: m, data_parallel: {size: 2, address: h, nodes: [{address: n, size_local: 2}]}}}",
            "which leaves none for this machine: raise size",
        ),
        (
            "  a: {vllm: {model: m, gpus: [zero]}}",
            '"zero" is neither an index (0, 1, ...) nor a uuid (GPU-... or MIG-...) as nvidia-smi -L shows it',
        ),
        ("  a: {vllm: {model: m, extra_args: [--port, '1']}}", "--port is set by Headgate"),
        ("  a: {vllm: {model: m, extra_args: [--api_key=x]}}", "--api-key is set by Headgate"),
        ("  a: {vllm: {model: m}, endpoints: ['http://e:1']}", "needs one of endpoints"),
        ("  a: {vllm: {model: m}, weights: [1]}", "weights and data_parallel_ranks are for endpoints"),
        (
            "  a: {vllm: {model: m, scheduling_policy: fcfs}, priority: class}",
            "set vllm.scheduling_policy: priority",
        ),
        ("  a: {vllm: {model: m, replcas: 2}}", 'unknown key; did you mean "replicas"?'),
    ],
)
def test_what_cannot_work_is_refused_where_it_stands(tmp_path, pools, line):
    lines = refusal(tmp_path, pools)
    assert any(line in found for found in lines), lines
    assert "Traceback" not in "".join(lines)
    assert "pydantic" not in "".join(lines)


def test_the_engines_variables_are_in_no_complaint(tmp_path):
    lines = refusal(
        tmp_path, "  a: {vllm: {model: m, env: {'HF TOKEN': hf_secret}, gpus: [0], tensor_parallel_size: 2}}"
    )
    assert "hf_secret" not in "".join(lines)


def test_pools_may_share_a_gpu_that_they_divide(tmp_path):
    path = tmp_path / "config.yaml"
    share = "{model: m, gpus: [0], gpu_memory_utilization: 0.45}"
    path.write_text(f"pools: {{a: {{vllm: {share}}}, b: {{vllm: {share}}}}}")
    config = load(path, {})
    assert config.enabled_pools()["a"].is_salted
    assert config.enabled_pools()["a"].priority == "class"


def test_what_is_not_said_of_salt_and_priority_depends_on_who_runs_the_engines(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "pools:\n"
        "  plain: {endpoints: ['http://127.0.0.1:1/v1']}\n"
        "  own: {vllm: {model: m, scheduling_policy: fcfs}, cache_salt: false}\n"
    )
    pools = load(path, {}).enabled_pools()
    assert [(pool.is_salted, pool.priority) for pool in pools.values()] == [(False, ""), (False, "")]
